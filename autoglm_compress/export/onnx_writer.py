"""Writing the files of a model for onnxruntime-genai, one tensor in memory at a time."""

import io
from contextlib import redirect_stdout
from pathlib import Path

from autoglm_compress.atomic import write_json
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.onnx_names import DATA, GRAPH, SETTINGS
from autoglm_compress.export.onnx_settings import runtime_settings
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.progress import Progress


def write_onnx(checkpoint: Checkpoint, options: ExportOptions, folder: Path, progress: Progress) -> None:
    """Write graph, tensors, settings and tokenizer; the graph appears last.

    Args:
        checkpoint: of a family and a quantization that ONNX Runtime has kernels for.
        options: of the export.
        folder: where to.
        progress: where it is shown.
    """
    # Both packages are the extra's.
    import onnx_ir as ir

    from autoglm_compress.export.onnx_builder import GraphModel

    with redirect_stdout(io.StringIO()):  # the builder tells of every layer
        builder = GraphModel(checkpoint, options, GRAPH)
        builder.make_model(str(checkpoint.folder))
        builder.make_genai_config(builder.hf_config, {}, str(folder))
    write_json(folder / SETTINGS, runtime_settings(folder / SETTINGS, checkpoint))
    checkpoint.tokenizer().save_pretrained(folder)
    builder.model.graph.sort()
    (folder / GRAPH).unlink(missing_ok=True)
    total = sum(value.const_value.nbytes for value in builder.model.graph.initializers.values())
    temporary = folder / f".{GRAPH}.partial"
    with progress.task(f"writing {DATA}", total=total, unit="B") as advance:
        ir.save(
            builder.model,
            temporary,
            format="protobuf",
            external_data=DATA,
            size_threshold_bytes=0,
            callback=lambda tensor, _: advance(tensor.nbytes),
        )
    temporary.replace(folder / GRAPH)
