"""Memory and disk that healing needs, from shapes alone."""

from math import prod

from autoglm_compress.architecture import ModelShape
from autoglm_compress.forward.logits import LOGITS_AT_ONCE
from autoglm_compress.healing.optimizer import EIGHT_BIT
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.teacher import TOKENS_AT_ONCE

FP32 = 4


def healing_memory(options: HealingOptions, shape: ModelShape, source: ModelShape) -> int:
    """Bytes of weights (or adapters), gradients and moments in fp32, of the teacher, and of logits.

    Activations come on top.
    """
    parameters = sum(prod(tensor) for _, tensor in shape.tensors())
    trained = trained_parameters(options, shape)
    weights = FP32 * parameters if options.lora is None else shape.element_bytes * parameters + FP32 * trained
    gradients, moments = FP32 * trained, (2 if options.optimizer in EIGHT_BIT else 2 * FP32) * trained
    averages = FP32 * trained if options.ema else 0
    resident = options.teacher_top_k is None or options.data == "teacher_samples"
    return weights + gradients + moments + averages + (source.bytes if resident else 0) + 5 * FP32 * LOGITS_AT_ONCE


def healing_scratch(options: HealingOptions, shape: ModelShape, source: ModelShape) -> int:
    """Bytes of disk: training state and best weights, both twice while they are replaced, and the stored teacher."""
    state = (2 * (4 if options.ema else 3) + 2) * FP32 * trained_parameters(options, shape)
    if options.teacher_top_k is None:
        return state
    return state + options.tokens * 6 * options.teacher_top_k + 2 * FP32 * TOKENS_AT_ONCE * source.hidden_size


def trained_parameters(options: HealingOptions, shape: ModelShape) -> int:
    """How many parameters are trained: all, adapters', or the scales of a quantized checkpoint."""
    if options.lora is not None:
        return options.lora.rank * sum(sum(tensor) for _, tensor in shape.linear_shapes())
    if shape.quantization is not None:
        schemes = shape.quantization.schemes
        linears = [(name, tensor) for name, tensor in shape.linear_shapes() if name in schemes]
        return sum(rows * schemes[name].groups(columns) for name, (rows, columns) in linears)
    return sum(prod(tensor) for _, tensor in shape.tensors())
