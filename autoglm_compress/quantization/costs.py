"""Memory and disk that quantizing needs, from shapes alone."""

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.run_text import HELD_OUT_TOKENS
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.evaluation.costs import agreement_memory
from autoglm_compress.forward.costs import (
    FP32,
    head_elements,
    largest_of_layer,
    layer_memory,
    pass_memory,
    reading_memory,
)
from autoglm_compress.forward.divergence import VOCABULARY_SLICE
from autoglm_compress.quantization.bit_allocation import groups_of
from autoglm_compress.quantization.grid import ELEMENTS_AT_ONCE
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.quantization.sensitivity import SAMPLE_TOKENS as STREAM_TOKENS
from autoglm_compress.quantization.sensitivity import stream_bytes
from autoglm_compress.quantization.smoothing import smoothing_pairs
from autoglm_compress.slices import SLICE_ROWS

PACKING = 10
"""Bytes for each integer while a linear is packed: shifted, padded, as int32, and the words."""


def quantizing_memory(options: QuantizationOptions, shape: ModelShape, calibration: CalibrationOptions) -> int:
    """Bytes of the most that a step holds: of a layer, of the choice of bits, or of the check of the result."""
    found = agreement_memory(shape, HELD_OUT_TOKENS)
    if options.head_bits is not None and options.head_bits < 16:
        # Stored, as integers of all parts and put together, and a part in fp32 while it is rounded.
        head, part = head_elements(shape), FP32 * min(SLICE_ROWS, shape.vocab_size) * shape.hidden_size
        found = max(found, (shape.element_bytes + 2) * head + 3 * part, (shape.element_bytes + 1 + PACKING) * head)
    if options.backend == "autoawq":
        return max(found, 2 * shape.bytes)
    if options.bits == "auto":
        found = max(found, _sensitivity_memory(options, shape))
    layers = max(map(shape.layer_elements, shape.kinds_of_layers))
    if options.method != "awq":
        widest = largest_of_layer(shape)
        return max(found, (FP32 + 1) * layers + (3 * FP32 + PACKING) * widest)
    return max(found, *(_layer_memory(shape, kind, calibration) for kind in shape.kinds_of_layers))


def _layer_memory(shape: ModelShape, layer: int, calibration: CalibrationOptions) -> int:
    """Bytes of quantizing a layer's pairs: its weights, integers that are found, and a pair's step.

    That is to measure: a pass, the inputs in fp32 and their magnitudes beside the Gram matrix. Or to round: the Gram
    matrix, in whose place it is factored; readers as they are, scaled, rounded, and a part of them five times while
    that goes on. Or to pack what is found.
    """
    tokens, elements = calibration.batch_tokens, shape.layer_elements(layer)
    tensors = shape.layer_tensors(layer)
    resting = FP32 * elements + elements
    found = resting + max(pass_memory(shape, tokens), reading_memory(shape), PACKING * largest_of_layer(shape))
    for pair in smoothing_pairs(shape, layer):
        rows = sum(tensors[f"{reader}.weight"][0] for reader in pair.readers)
        columns = tensors[f"{pair.readers[0]}.weight"][1]
        gram, readers = FP32 * columns**2, FP32 * rows * columns
        part = FP32 * min(rows * columns, max(ELEMENTS_AT_ONCE, columns))
        # The linears' own weights are let go of meanwhile.
        found = max(found, resting + gram + pass_memory(shape, tokens) + FP32 * tokens * columns)
        found = max(found, resting - readers + gram + max(2 * readers, 2 * readers + 5 * part))
    return found


def _sensitivity_memory(options: QuantizationOptions, shape: ModelShape) -> int:
    """Bytes of the streams, twice, the layer they go through, and a pass, a linear that is rounded, or logits."""
    tokens = STREAM_TOKENS
    rounding = FP32 * largest_of_layer(shape) + 4 * FP32 * min(largest_of_layer(shape), ELEMENTS_AT_ONCE)
    logits = FP32 * VOCABULARY_SLICE * (5 * tokens + shape.hidden_size) + shape.element_bytes * head_elements(shape)
    step = max(pass_memory(shape, tokens), rounding, reading_memory(shape), logits)
    return layer_memory(shape) + 2 * _stream_bytes(options, shape) + step


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
