"""Bytes of an export to ONNX Runtime: on disk, while it is written, and while the engine runs it."""

from collections.abc import Iterator
from math import prod

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.eight_bits import BLOCK, SLICE_ROWS, require_blocks
from autoglm_compress.export.onnx_blocks import BlockLayout, block_layout

TYPES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
GRAPH_BYTES, LAYER_BYTES = 50_000, 30_000
"""Of nodes: of a graph without layers, and of each layer."""
WRITER_BYTES, ENGINE_BYTES = 64_000_000, 128_000_000
"""What the two take beside the model: libraries, activations, the tokenizer."""
ROUNDING = 6 * 4
"""Bytes for each value of a slice of rows that is rounded to 8 bits."""
UNPACKING = 6
"""Bytes for each value of a quantized linear while its integers are unpacked and packed again."""


def stored_bytes(shape: ModelShape, embedding_bits: int | None) -> Iterator[tuple[str, str, int]]:
    """Name, type and bytes of every tensor of the checkpoint as the graph stores it.

    Args:
        shape: the model's.
        embedding_bits: 8 to round a 16-bit embedding and a 16-bit head, None for what they are.

    Raises:
        ValueError: there is no kernel for how one is quantized; the message names it. EndsError if it is an end that
            cannot be in 8 bits.
    """
    for name, size in shape.tensors():
        try:
            layout = _layout(shape, name, size, embedding_bits)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None
        if layout is not None:
            yield name, f"INT{layout.bits}", size[0] * sum(layout.row_bytes)
        elif len(size) == 1:
            yield name, "FP32", 4 * size[0]
        else:
            yield name, TYPES[shape.dtype], prod(size) * shape.element_bytes


def _layout(shape: ModelShape, name: str, size: tuple[int, ...], embedding_bits: int | None) -> BlockLayout | None:
    module = name.removesuffix(".weight")
    if module != name and module in shape.schemes:
        return block_layout(shape.schemes[module], size[1])
    if embedding_bits is None or name not in (shape.family.embedding, shape.family.head):
        return None
    require_blocks(size[1])
    return BlockLayout(embedding_bits, BLOCK, size[1], symmetric=True)


def graph_bytes(shape: ModelShape) -> int:
    """Bytes of the graph without its tensors, at most."""
    return GRAPH_BYTES + LAYER_BYTES * shape.num_hidden_layers


def writing_bytes(shape: ModelShape, embedding_bits: int | None) -> int:
    """Bytes of memory that writing takes: the largest matrix as it is and as it is stored."""
    largest = max(
        prod(size) * (2 * shape.element_bytes + (UNPACKING if name.removesuffix(".weight") in shape.schemes else 0))
        for name, size in shape.tensors()
    )
    return WRITER_BYTES + largest + (0 if embedding_bits is None else ROUNDING * SLICE_ROWS * shape.hidden_size)


def engine_bytes(shape: ModelShape, embedding_bits: int | None) -> int:
    """Bytes of the engine with the model: matrices of plain numbers are in fp32, and one is put in order at a time.

    What embeddings look up stays as it is stored.
    """
    found, largest = ENGINE_BYTES, 0
    for name, kind, size in stored_bytes(shape, embedding_bits):
        looked_up, integers = name == shape.family.embedding, kind.startswith("INT")
        multiplied = not looked_up or shape.tie_word_embeddings
        widened = 4 * size // shape.element_bytes if multiplied and not integers else 0
        found += widened + (size if integers or looked_up else 0)
        largest = max(largest, widened or (size if multiplied else 0))
    return found + largest
