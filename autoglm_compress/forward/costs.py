"""Memory of a walk on a CPU, from shapes alone. It computes in fp32 there.

What a layer holds for each token was measured on one of `transformers`, Llama and GLM, of several widths: tensors of
the residual stream's width h, of all query heads q, of all key (or value) heads k, and of the FFN f.
"""

from math import prod

from autoglm_compress.architecture import ModelShape
from autoglm_compress.forward.statistics import SAMPLE_TOKENS
from autoglm_compress.memory import MOST_FREED

FP32, FP64 = 4, 8


def layer_memory(shape: ModelShape) -> int:
    """Bytes of the largest layer's weights."""
    return FP32 * max(map(shape.layer_elements, shape.kinds_of_layers))


def reading_memory(shape: ModelShape) -> int:
    """Bytes of the largest tensor of a layer while it is read: stored, or packed integers unpacked and multiplied."""
    stored = 1 + 3 * shape.element_bytes if shape.quantization else shape.element_bytes
    return stored * largest_of_layer(shape)


def largest_of_layer(shape: ModelShape) -> int:
    """Elements of the largest tensor of any layer."""
    return max(prod(size) for kind in shape.kinds_of_layers for size in shape.layer_tensors(kind).values())


def head_elements(shape: ModelShape) -> int:
    """Elements of the embedding, or of the head."""
    return shape.vocab_size * shape.hidden_size


def pass_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of the activations while a batch of so many tokens goes through a layer, and of it before and after.

    Of attention: normed states, queries, keys and values before and after they are rotated, on the way there, and what
    comes out. Of the FFN: the stream, normed states, gate, its activation, up (fused with the gate: both stay) and the
    product.
    """
    attention = shape.hidden_size + 4 * shape.axis("query") + 3 * shape.axis("key_value")
    ffn = 2 * shape.hidden_size + (4 if shape.family.roles.ffn.gate_up else 3) * shape.intermediate_size
    return FP32 * tokens * (2 * shape.hidden_size + max(attention, ffn))


def training_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of what a layer keeps of so many tokens for its gradients, and of what backward makes beside it."""
    return graph_memory(shape, tokens) + FP32 * tokens * 2 * (shape.hidden_size + shape.intermediate_size)


def graph_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of what a layer keeps of so many tokens for its gradients.

    Both norms keep three tensors; attention its rotated and unrotated heads and the output; the FFN gate, its
    activation, up and the product.
    """
    heads = 3 * shape.axis("query") + 2 * shape.axis("key_value")
    return FP32 * tokens * (8 * shape.hidden_size + heads + 4 * shape.intermediate_size)


def freed_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes that were freed and stay with the process, for what is needed next: a batch's activations, or less."""
    return min(pass_memory(shape, tokens), MOST_FREED)


def walk_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of a walk in batches of so many tokens: a layer and a batch's activations, or the embedding it begins at.

    The states of other batches are in files, and let go of.
    """
    layer = layer_memory(shape) + max(reading_memory(shape), pass_memory(shape, tokens))
    return max(layer, shape.element_bytes * head_elements(shape) + FP32 * tokens * shape.hidden_size)


def seeing_memory(shape: ModelShape) -> int:
    """Bytes while towers see and hear: all of them, in fp32 and as they are stored, beside the embedding."""
    towers = sum(FP32 * tower.parameters + tower.bytes for tower in shape.kept)
    return towers + shape.element_bytes * head_elements(shape)


def measuring_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of the walk that measures the statistics of a model.

    Of the FFN's activations there are squares, and these in fp64 to be added up; of each norm before linears the sum
    of Gram matrices, which are four times as many while a layer's are put together and written.
    """
    norms = len(shape.family.norm_readers)
    gram = FP32 * shape.hidden_size**2
    states = 2 * SAMPLE_TOKENS * shape.hidden_size
    ffn = (6 if shape.family.roles.ffn.gate_up else 4) * shape.intermediate_size
    summing = max(pass_memory(shape, tokens), FP32 * tokens * (4 * shape.hidden_size + ffn)) + (norms + 2) * gram
    found = layer_memory(shape) + states + max(reading_memory(shape), summing, 2 * (norms + 1) * gram)
    return max(found, walk_memory(shape, tokens))


def rewriting_memory(before: ModelShape, after: ModelShape, shard: int) -> int:
    """Bytes of writing a checkpoint unit by unit, and of collecting small ones in shards of so many bytes at least.

    Of a unit there are all tensors as they will be, and one as it was, in fp32 where it is multiplied.
    """
    outside, largest = before.element_bytes * head_elements(before), largest_of_layer(before)
    if after.hidden_size != before.hidden_size:
        outside += after.element_bytes * head_elements(after)
    layer = max(map(after.layer_bytes, after.kinds_of_layers)) + (FP32 + before.element_bytes) * largest
    unit = max(max(map(after.layer_bytes, after.kinds_of_layers)), after.element_bytes * head_elements(after))
    return max(layer, outside, min(after.bytes, shard + unit))
