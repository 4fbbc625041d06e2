"""Memory and disk that healing needs, from shapes alone."""

from math import prod

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import BATCH_TOKENS
from autoglm_compress.calibration.training_rows import DECIDING_TOKENS
from autoglm_compress.forward.costs import (
    FP32,
    graph_memory,
    head_elements,
    largest_of_layer,
    training_memory,
    walk_memory,
)
from autoglm_compress.forward.logits import logits_memory
from autoglm_compress.forward.one_layer_model import fast_cpu_dtype
from autoglm_compress.healing.muon import STACKED
from autoglm_compress.healing.optimizer import EIGHT_BIT
from autoglm_compress.healing.options import HealingOptions
from autoglm_compress.healing.teacher import TOKENS_AT_ONCE
from autoglm_compress.memory import MOST_FREED

ROW_BYTES = 4
"""Bytes of a token of the rows to train on."""
PACKING_BYTES = 5 * ROW_BYTES
"""Bytes of a token at most while rows are made: packed, as int64 for a look at the vocabulary, and joined."""


def healing_memory(options: HealingOptions, shape: ModelShape, source: ModelShape, length: int) -> int:
    """Bytes of weights and moments, of the teacher, of the text, and of the most that a step on rows of `length` adds.

    Those are a forward pass's activations, logits and the head's gradient, or all gradients and what the optimizer
    makes of the largest one; with rows of a batch one after the other, gradients are there in the forward pass too.
    """
    trained = trained_parameters(options, shape)
    # Where the CPU has instructions for bf16, weights that are not trained are in 16 bits, and others are copied.
    stored = dtype_bytes(shape)
    weights = FP32 * _elements(shape) if options.lora is None else stored * _elements(shape) + FP32 * trained
    copies = stored * _elements(shape) if stored < FP32 and options.lora is None else 0
    fixed = weights + copies + _moments(options, shape) + (FP32 * trained if options.ema else 0)
    resident = options.teacher_top_k is None or options.data == "teacher_samples"
    teacher = dtype_bytes(source) * _elements(source) if resident else 0
    fixed += teacher
    if options.optimizer == "muon":  # of the many blocks that its iteration frees
        fixed += min(_stepping(options, shape), MOST_FREED)
    head = FP32 * head_elements(shape) if options.lora is None else 0
    gradients = FP32 * trained
    rows = options.micro_batch_size or options.batch_size
    forward = (
        _activations(options, shape, source, rows * length) + logits_memory(rows * length, shape.vocab_size) + head
    )
    # The head's gradient is copied to its parameter, and as an embedding it has another.
    stepping = gradients + max(2 * head, _stepping(options, shape))
    found = (
        fixed + max(forward + (gradients if rows < options.batch_size else 0), stepping) + ROW_BYTES * options.tokens
    )
    found = max(found, teacher + PACKING_BYTES * options.tokens)
    if options.teacher_top_k is None:
        return found
    tokens = max(BATCH_TOKENS // length, 1) * length
    head = dtype_bytes(source) * head_elements(source) + logits_memory(tokens, source.vocab_size)
    return max(found, max(walk_memory(source, tokens), head) + ROW_BYTES * options.tokens)


def _activations(options: HealingOptions, shape: ModelShape, source: ModelShape, tokens: int) -> int:
    """Bytes of what a student keeps of so many tokens for its gradients; with `residual`, of all states of both."""
    layers, states = shape.num_hidden_layers, FP32 * tokens * shape.hidden_size
    if options.gradient_checkpointing:
        found = layers * states + training_memory(shape, tokens)
    else:
        found = (layers - 1) * graph_memory(shape, tokens) + training_memory(shape, tokens)
    if options.residual:
        found += layers * states + FP32 * tokens * source.hidden_size * (source.num_hidden_layers + 1)
    return found + 4 * states


def _moments(options: HealingOptions, shape: ModelShape) -> int:
    trained = trained_parameters(options, shape)
    if options.optimizer in EIGHT_BIT:
        return 2 * trained
    if options.optimizer == "adamw" or options.lora is not None:
        return 2 * FP32 * trained
    in_layers = sum(rows * columns for _, (rows, columns) in shape.linear_shapes())
    return FP32 * (in_layers + 2 * (trained - in_layers))


def _stepping(options: HealingOptions, shape: ModelShape) -> int:
    """Bytes of what the optimizers make of a gradient: AdamW of one, twice; Muon of a stack of them, seven times."""
    if options.lora is not None or options.optimizer in EIGHT_BIT:
        return 0
    largest = max(prod(tensor) for _, tensor in shape.tensors())
    if options.optimizer == "adamw":
        return 2 * FP32 * largest
    in_layers = sum(rows * columns for _, (rows, columns) in shape.linear_shapes())
    stacked = min(max(STACKED, largest_of_layer(shape)), in_layers)
    return max(2 * FP32 * head_elements(shape), 7 * FP32 * stacked)


def dtype_bytes(shape: ModelShape) -> int:
    """Bytes of a weight that is not trained, as a CPU computes with it."""
    return fast_cpu_dtype(getattr(torch, shape.dtype)).itemsize


def _elements(shape: ModelShape) -> int:
    return sum(prod(tensor) for _, tensor in shape.tensors())


def healing_scratch(options: HealingOptions, shape: ModelShape, source: ModelShape) -> int:
    """Bytes of disk: training state and best weights, both twice while they are replaced, and stored text and teacher.

    Text of the calibration sources is not stored.
    """
    state = (2 * (4 if options.ema else 3) + 2) * FP32 * trained_parameters(options, shape)
    if options.data != "calibration":
        state += ROW_BYTES * (options.tokens + DECIDING_TOKENS)
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
