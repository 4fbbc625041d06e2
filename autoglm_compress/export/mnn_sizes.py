"""How every tensor of a checkpoint is stored for MNN, and its bytes."""

from collections.abc import Iterator
from math import prod

from autoglm_compress.architecture import ModelShape, Scheme
from autoglm_compress.export.eight_bits import BLOCK, SLICE_ROWS

GRAPH_BYTES, LAYER_BYTES = 50_000, 40_000
"""Of the graph: without layers, and of each layer."""
WRITER_BYTES, ENGINE_BYTES = 720_000_000, 64_000_000
"""What the two processes take beside the model: libraries, torch among the writer's; activations, the tokenizer."""
UNPACKING, ROUNDING = 6, 6 * 4
"""Bytes for each value of a matrix that is unpacked and packed again, and of a slice that is rounded to 8 bits."""
BITS = (4, 8)
ENDS = Scheme(8, BLOCK, symmetric=True)
"""How a 16-bit embedding and head are stored with `embedding_bits: 8`."""


def stored_scheme(shape: ModelShape, module: str, embedding_bits: int | None) -> Scheme | None:
    """How the integers of a module are stored; None for plain numbers.

    Args:
        shape: the model's.
        module: the full name of a linear or of the embedding.
        embedding_bits: 8 to round a 16-bit embedding and a 16-bit head, None for what they are.
    """
    ends = (shape.family.embedding, shape.family.head)
    return shape.schemes.get(module) or (ENDS if embedding_bits and f"{module}.weight" in ends else None)


def scheme_problem(shape: ModelShape) -> str | None:
    """Why MNN cannot run what a model is quantized to; None if it can."""
    for module, scheme in shape.schemes.items():
        if scheme.bits not in BITS:
            return f"{module}: INT{scheme.bits}: linears of {' and '.join(map(str, BITS))} bits are exported"
    return None


def group_of(scheme: Scheme | None) -> int:
    """The inputs of a group, as MNN has it: 0 for whole rows, and for plain numbers."""
    return 0 if scheme is None or scheme.group_size == -1 else scheme.group_size


def stored_bytes(shape: ModelShape, embedding_bits: int | None) -> Iterator[tuple[str, str, int]]:
    """Name, type and bytes of every tensor as it is stored. The head of a tied model is its embedding."""
    for name, size in shape.tensors():
        if len(size) == 1:
            yield name, "FP32", 4 * size[0] * (1 if name.endswith(".bias") else 2)  # norms have a bias of zeros
        elif scheme := stored_scheme(shape, name.removesuffix(".weight"), embedding_bits):
            numbers = size[0] * scheme.groups(size[1]) * (1 if scheme.symmetric else 2)
            yield name, f"INT{scheme.bits}", prod(size) * scheme.bits // 8 + 4 * numbers
        else:
            looked_up = name == shape.family.embedding and not shape.tie_word_embeddings
            yield name, "BF16" if looked_up and shape.dtype == "bfloat16" else "FP16", 2 * prod(size)


def graph_bytes(shape: ModelShape) -> int:
    """Bytes of the graph without its tensors, at most."""
    return GRAPH_BYTES + LAYER_BYTES * shape.num_hidden_layers


def writing_bytes(shape: ModelShape, embedding_bits: int | None) -> int:
    """Bytes of memory that writing takes: the largest matrix as it is and as it is stored."""
    largest = max(prod(size) for _, size in shape.tensors()) * (shape.element_bytes + UNPACKING)
    return WRITER_BYTES + largest + (ROUNDING * SLICE_ROWS * shape.hidden_size if embedding_bits else 0)


def engine_bytes(shape: ModelShape, embedding_bits: int | None) -> int:
    """Bytes of the engine in its exact mode, which has all linears in fp32; embeddings are read from the disk."""
    linears = sum(prod(size) for name, size in shape.tensors() if name != shape.family.embedding)
    head = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
    stored = sum(size for _, _, size in stored_bytes(shape, embedding_bits))
    return ENGINE_BYTES + 4 * (linears + head) + stored
