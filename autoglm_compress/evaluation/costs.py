"""Memory that measuring a checkpoint takes, from shapes alone."""

from collections.abc import Sequence

from autoglm_compress.architecture import ModelShape
from autoglm_compress.evaluation.options import EvaluationOptions
from autoglm_compress.forward.costs import FP32, head_elements, largest_of_layer, pass_memory, walk_memory
from autoglm_compress.forward.logits import COMPARED, LOGITS_AT_ONCE

TOKEN_BUDGET = 1_024
"""Tokens of one batch. On CPUs small batches win, because a layer's activations then stay in the cache."""
HIDDEN_STATE_BYTES = 1 << 30
"""Hidden states of one walk. The walk holds them twice, and the positions that are scored are copied once more."""
VOCAB_SLICE = 16_384
POSITION_SLICE = 2_048
"""Logits of one slice: 2,048 x 16,384 x 4 bytes = 128 MiB."""
GENERATED = 2_048
"""Tokens of a long row that an answer is generated for."""
QUESTIONS = 96 << 20
"""Bytes of the texts, requests and scores of some thousand questions."""


def evaluation_memory(shape: ModelShape, tasks: Sequence[str], options: EvaluationOptions) -> int:
    """Bytes of scoring tasks: a walk in small batches, then states, the head and two slices of logits; 0 for no tasks.
    Generating answers takes more than that.

    Of perplexity all states are scored. Questions of other tasks share most of their tokens, and a position or a few
    of each are scored: those are taken to be no more than perplexity has by default.
    """
    generating = generation_memory(shape) if "generate" in tasks else 0
    if not set(tasks) - {"generate"}:
        return generating
    length = options.perplexity.sequence_length
    scored = min(options.perplexity.samples * length * shape.hidden_size * FP32, HIDDEN_STATE_BYTES)
    slices = FP32 * POSITION_SLICE * (2 * min(VOCAB_SLICE, shape.vocab_size) + 3 * shape.hidden_size)
    head = shape.element_bytes * head_elements(shape) + FP32 * min(VOCAB_SLICE, shape.vocab_size) * shape.hidden_size
    loaded = QUESTIONS if set(tasks) - {"perplexity"} else 0
    return max(generating, loaded + max(walk_memory(shape, max(TOKEN_BUDGET, length)), scored + head + slices))


def generation_memory(shape: ModelShape) -> int:
    """Bytes of generating answers: the whole model in fp32, the largest tensor as it is stored, and what a long row
    takes on its way through a layer.
    """
    largest = max(head_elements(shape), largest_of_layer(shape), *(tower.parameters for tower in shape.kept), 0)
    return FP32 * shape.parameters + shape.element_bytes * largest + pass_memory(shape, GENERATED)


def agreement_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes of comparing two checkpoints on so many tokens: a walk with its states, or two heads and their logits.

    States are in memory, of the walk twice, and of the two checkpoints. Of logits there are those of both, as they are
    and as log-probabilities, and three tensors on the way to the divergence.
    """
    states = FP32 * tokens * shape.hidden_size
    logits = 7 * FP32 * min(LOGITS_AT_ONCE // COMPARED, tokens * shape.vocab_size)
    heads = 2 * shape.element_bytes * head_elements(shape)
    return max(4 * states + walk_memory(shape, tokens), 2 * states + heads + logits)
