"""Exporting a checkpoint."""

from pathlib import Path

from pydantic import ValidationError

from autoglm_compress.api.arguments import Device, Place, named_family_in, shown_progress
from autoglm_compress.checked import checked
from autoglm_compress.errors import UserError
from autoglm_compress.export.command import ExportRequest, export_into
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.memory_limit import limit_in_bytes
from autoglm_compress.records.export import ExportRecord


@checked
def export_checkpoint(
    checkpoint: Place,
    output: Place,
    format: str,
    *,
    embedding_bits: int | None = None,
    accuracy_level: int | None = None,
    called: str | None = None,
    text: str | None = None,
    family: Place | None = None,
    device: Device = "auto",
    memory_limit: str | int | None = None,
    progress: bool = False,
) -> ExportRecord:
    """Write a checkpoint as files that an engine runs, and prove that the engine predicts the same.

    Args:
        checkpoint: a folder with config, tokenizer and safetensors.
        output: the folder that the files go into; it is not there yet, or is empty.
        format: `gguf` for llama.cpp, `onnx` for ONNX Runtime.
        embedding_bits: 8 to round embedding and head; as the checkpoint has them by default.
        accuracy_level: of ONNX Runtime's products, 0 in fp32 or 4; 4 by default.
        called: what the model is called; the folder's name by default.
        text: for the proof, as recipes name it; `python-docs` by default.
        family: a YAML file that describes the model's family, if the family is unknown.
        device: where the reference for the proof runs.
        memory_limit: a size such as `8GB`, or bytes: an export that may need more is refused.
        progress: whether to print how it goes.

    Returns:
        What `export.json` has.

    Raises:
        UserError: an argument is of a wrong type, an option cannot be, the checkpoint cannot be exported, or the engine
            does not predict the same.
    """
    given = {
        "format": format,
        "embedding_bits": embedding_bits,
        "accuracy_level": accuracy_level,
        "called": called,
    }
    try:
        options = ExportOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: given {first['input']!r}: {first['msg']}.") from None
    request = ExportRequest(
        Path(checkpoint),
        Path(output),
        options,
        text,
        device,
        named_family_in(family),
        limit_in_bytes(memory_limit),
    )
    return export_into(request, shown_progress(progress))
