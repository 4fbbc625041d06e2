"""Memory and disk that quantizing needs, from shapes alone."""

from math import prod

from autoglm_compress.architecture import ModelShape
from autoglm_compress.forward.logits import LOGITS_AT_ONCE
from autoglm_compress.quantization.bit_allocation import groups_of
from autoglm_compress.quantization.grid import ELEMENTS_AT_ONCE
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.quantization.sensitivity import stream_bytes


def quantizing_memory(options: QuantizationOptions, shape: ModelShape) -> int:
    """Peak bytes of a step beside a layer and its activations.

    With AWQ that is the widest Gram matrix, in whose place it is factored, the largest linears that share inputs,
    as they are and scaled, a part of them while it is rounded, and the layer's integers. Or it is the two heads
    that the result is checked by, and their logits; or the streams of `bits: auto` and a layer.
    """
    check = 2 * shape.element_bytes * shape.vocab_size * shape.hidden_size + 10 * LOGITS_AT_ONCE
    widest = max(prod(tensor) for kind in shape.kinds_of_layers for tensor in shape.layer_tensors(kind).values())
    layer = max(map(shape.layer_elements, shape.kinds_of_layers))
    if options.bits == "auto":
        check = max(check, 4 * layer + 2 * _stream_bytes(options, shape))
    if options.backend == "autoawq":
        return max(check, 2 * shape.bytes)
    if options.method != "awq":
        return max(check, 4 * 4 * widest)
    readers = max(widest, 2 * shape.intermediate_size * shape.hidden_size)
    rounding = 5 * min(readers, ELEMENTS_AT_ONCE)
    return max(check, 4 * (shape.widest_input**2 + 2 * readers + rounding) + layer)


def quantizing_scratch(options: QuantizationOptions, shape: ModelShape, tokens: int) -> int:
    """Bytes of disk for the walk's two buffers and for activations kept within a layer, fp32.

    With `bits: auto` the streams of all groups, while they are replaced.
    """
    wide = 4 * shape.hidden_size + shape.axis("query") + shape.intermediate_size
    walked = 4 * tokens * wide if options.looks_at_activations else 0
    return max(walked, 2 * _stream_bytes(options, shape))


def fed_back_fan_in(options: QuantizationOptions, shape: ModelShape) -> int:
    """Inputs of the widest linear with error feedback; 0 without error feedback."""
    if options.backend != "own" or options.method != "awq" or not options.error_feedback:
        return 0
    return shape.widest_input


def _stream_bytes(options: QuantizationOptions, shape: ModelShape) -> int:
    return stream_bytes(shape, len(groups_of(shape))) if options.bits == "auto" else 0
