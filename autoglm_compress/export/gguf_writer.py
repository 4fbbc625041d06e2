"""Writing a GGUF file tensor by tensor, so that one tensor is all that is in memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autoglm_compress.architecture import ModelShape
from autoglm_compress.atomic import appearing
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.exactness import Exactness
from autoglm_compress.export.gguf_families import engine_family, rope_factors
from autoglm_compress.export.gguf_metadata import add_metadata
from autoglm_compress.export.gguf_tensors import StoredTensor, make_tensor, stored_tensors
from autoglm_compress.export.gguf_tokenizer import EngineTokenizer, add_tokenizer
from autoglm_compress.progress import Progress

FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
}
ROPE_FACTORS = "rope_freqs.weight"
Stored = TypeVar("Stored", bound=StoredTensor)


def write_gguf(
    checkpoint: Checkpoint,
    tokenizer: EngineTokenizer,
    file: Path,
    name: str,
    embedding_bits: int | None,
    progress: Progress,
) -> Exactness:
    """Write a checkpoint as a GGUF file, which appears under its name when it is complete.

    Args:
        checkpoint: of a family and a quantization that GGUF holds.
        tokenizer: the checkpoint's.
        file: where to.
        name: what the file calls the model.
        embedding_bits: as `stored_tensors` takes it.
        progress: where it is shown.

    Returns:
        What was rounded.
    """
    tensors, exactness = stored_tensors(checkpoint.shape, embedding_bits), Exactness()
    writer = _writer(
        checkpoint.shape, checkpoint.model_config, tokenizer, name, most_bytes_type(checkpoint.shape, embedding_bits)
    )
    factors = rope_factors(checkpoint.shape, checkpoint.model_config)
    if factors is not None:
        tensors.append(StoredTensor(ROPE_FACTORS, ROPE_FACTORS, tuple(factors.shape), "F32"))

    def make(tensor: StoredTensor) -> np.ndarray:
        if factors is not None and tensor.name == ROPE_FACTORS:
            return factors.numpy()
        return make_tensor(checkpoint, tensor, exactness)

    write_tensors(writer, file, tensors, make, progress)
    return exactness


def write_tensors(
    writer: Any, file: Path, tensors: Sequence[Stored], make: Callable[[Stored], np.ndarray], progress: Progress
) -> None:
    """Write a file that appears under its name when it is complete.

    Args:
        writer: a `gguf.GGUFWriter` that has all but tensors.
        file: where to.
        tensors: the tensors in the order of the file.
        make: gives the bytes of each.
        progress: where it is shown.
    """
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.engine_name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    total = sum(tensor.nbytes for tensor in tensors)
    with appearing(file) as temporary, progress.task(f"writing {file.name}", total=total, unit="B") as advance:
        _open(writer, temporary)
        try:
            for tensor in tensors:
                writer.write_tensor_data(make(tensor))
                advance(tensor.nbytes)
        finally:
            writer.close()


def write_vocabulary(shape: ModelShape, config: Any, tokenizer: EngineTokenizer, file: Path) -> None:
    """Write a GGUF file without tensors, for the engine to read texts by."""
    writer = _writer(shape, config, tokenizer, "vocabulary", "F32")
    _open(writer, file)
    writer.close()


def most_bytes_type(shape: ModelShape, embedding_bits: int | None) -> str:
    """The type that most bytes of the layers' matrices have, by which a file is known."""
    found: Counter[str] = Counter()
    for tensor in stored_tensors(shape, embedding_bits):
        if len(tensor.shape) > 1 and shape.family.place(tensor.name).layer is not None:
            found[tensor.type] += tensor.nbytes
    return found.most_common(1)[0][0]


def _writer(shape: ModelShape, config: Any, tokenizer: EngineTokenizer, name: str, kind: str) -> Any:
    """A `gguf.GGUFWriter` that has all but tensors."""
    import gguf

    writer = gguf.GGUFWriter(None, engine_family(shape).architecture)
    add_metadata(writer, shape, config, name, int(gguf.LlamaFileType[FILE_TYPES[kind]]))
    add_tokenizer(writer, tokenizer)
    return writer


def _open(writer: Any, file: Path) -> None:
    """Write what stands before the tensors."""
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
