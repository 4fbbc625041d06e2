"""How many tokens each layer's attention has to read, for predictions to stay what they are.

One walk finds what reading fewer tokens changes in each layer's output. A layer then reads the fewest with which the
change is within a threshold, the same for all layers. Bisection finds the largest threshold whose predictions, measured
with all layers together, are near enough.
"""

from collections.abc import Callable

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.attention.settings import (
    FIRST,
    SCORE_BYTES,
    SCORES,
    AttentionOptions,
    LayerAttention,
    SparseAttention,
)
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.forward.costs import FP32, head_elements, walk_memory
from autoglm_compress.forward.divergence import Divergence
from autoglm_compress.forward.features import embedded, with_features_of
from autoglm_compress.forward.one_layer_model import OneLayerModel
from autoglm_compress.forward.walk import walk
from autoglm_compress.runtime import Runtime

TUNING_TOKENS = 4096
"""The most tokens that decide, in whole rows."""
MULTIPLES = (1, 2, 4, 8)
"""Of the recipe's `top_k`, what a layer may read if it needs more; after that, everything."""
MARGIN = 0.8
"""The part of the limit that is used up, as other text diverges more or less."""
Changes = list[dict[int, float]]
"""For each layer, what reading so many tokens changes, relative to what the layer does."""
Choice = tuple[int | None, ...]
"""For each layer the tokens it reads; None for all."""
DENSE = LayerAttention(None, AttentionOptions(kv_bits=16))


def reading_memory(shape: ModelShape, sequence_length: int) -> int:
    """Bytes of the walks over rows of so many tokens, with the states before and after them, and of scores."""
    tokens = max(TUNING_TOKENS, sequence_length)
    states = 3 * FP32 * tokens * shape.hidden_size
    return walk_memory(shape, tokens) + states + SCORE_BYTES * SCORES + 2 * FP32 * head_elements(shape)


def attending(checkpoint: Checkpoint, attention: SparseAttention) -> Checkpoint:
    """The same checkpoint, whose attention reads few tokens in walks."""
    other = with_features_of(Checkpoint(checkpoint.folder, checkpoint.family), checkpoint)
    other.attention = attention
    return other


def tuning_rows(batches: list[torch.Tensor]) -> torch.Tensor:
    """The rows [rows, length] that decide."""
    rows = torch.cat(batches)
    return rows[: max(1, TUNING_TOKENS // rows.shape[1])]


def choose_tokens_read(
    checkpoint: Checkpoint,
    options: AttentionOptions,
    top_k: int,
    most: float,
    rows: torch.Tensor,
    runtime: Runtime,
) -> SparseAttention:
    """The fewest tokens that layers can read with predictions within a limit, on rows where all of it is sparse.

    Args:
        checkpoint: the model.
        options: `dense_below` does not count here.
        top_k: the fewest.
        most: mean KL divergence in nats, of which MARGIN is used.
        rows: token ids [rows, length].
        runtime: where to compute.

    Raises:
        UserError: not even with everything read, because of what the cache rounds.
    """
    [reference] = walk(checkpoint, [rows], None, runtime=runtime, title="reference")
    divergence = Divergence(checkpoint, reference.clone(), runtime.device)
    fields = {name: getattr(options, name) for name in AttentionOptions.model_fields} | {"dense_below": 0}

    def measure(chosen: Choice) -> float:
        sparse = attending(checkpoint, SparseAttention(**fields, top_k=chosen))
        [states] = walk(sparse, [rows], None, runtime=runtime, title="read fewer tokens")
        return float(divergence.of(states[None]))

    chosen, found = fewest(
        changes_by_layer(checkpoint, AttentionOptions(**fields), top_k, rows, runtime), most * MARGIN, measure
    )
    if found > most * MARGIN:
        raise UserError(
            f"a cache of {options.kv_bits} bits alone changes predictions by {found:.3g} nats, at most {most:g} "
            f"(with a margin: {most * MARGIN:g}) are allowed. Use kv_bits: 16, or allow more with max_divergence."
        )
    return SparseAttention(**(fields | {"dense_below": options.dense_below}), top_k=chosen)


def fewest(changes: Changes, most: float, measure: Callable[[Choice], float]) -> tuple[Choice, float]:
    """The choice of the largest threshold that `measure` finds within `most`, with what it found.

    Where no threshold is, everything is read.
    """
    thresholds = sorted({change for layer in changes for change in layer.values()})
    best = _within(changes, thresholds[-1])
    found = measure(best)
    if found <= most:
        return best, found
    best = (None,) * len(changes)
    found = measure(best)
    low, high = 0, len(thresholds) - 1  # the threshold at `high` is too large
    while low < high and found <= most:
        middle = (low + high) // 2
        candidate = _within(changes, thresholds[middle])
        value = measure(candidate)
        if value <= most:
            best, found, low = candidate, value, middle + 1
        else:
            high = middle
    return best, found


def _within(changes: Changes, threshold: float) -> Choice:
    """The fewest tokens for each layer that change it by no more than a threshold; None for everything."""
    return tuple(
        min((top_k for top_k, change in layer.items() if change <= threshold), default=None) for layer in changes
    )


@torch.no_grad()
def changes_by_layer(
    checkpoint: Checkpoint, options: AttentionOptions, top_k: int, rows: torch.Tensor, runtime: Runtime
) -> Changes:
    """The squared change of each layer's output, relative to what the layer adds to the stream, by tokens read."""
    model = OneLayerModel(checkpoint, runtime.device, torch.float32)
    stream = model.to_compute(embedded(checkpoint, rows, checkpoint.read(checkpoint.family.embedding)))
    counts = [top_k * multiple for multiple in MULTIPLES if top_k * multiple + options.window + FIRST < rows.shape[1]]
    found: Changes = []
    layers = checkpoint.shape.num_hidden_layers
    with runtime.progress.task("measure what layers have to read", total=layers, unit="layers") as advance:
        for layer in range(layers):
            _, run = model.load(layer)
            model.attend(DENSE)
            after = run(stream, rows)
            added = float((after - stream).square().sum())
            changes = {}
            for count in counts:
                model.attend(LayerAttention(count, options, every_query=True))
                changes[count] = float((run(stream, rows) - after).square().sum()) / max(added, 1e-30)
            found.append(changes)
            stream = after
            advance(1)
    model.release()
    return found
