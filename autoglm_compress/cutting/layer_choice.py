"""Which decoder layers to drop: by the states between layers, or by the predictions of the whole model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.cutting.lineage import Indices
from autoglm_compress.errors import UserError
from autoglm_compress.forward.costs import FP32, head_elements, layer_memory, pass_memory, walk_memory
from autoglm_compress.forward.divergence import VOCABULARY_SLICE, Divergence
from autoglm_compress.forward.features import embedded
from autoglm_compress.forward.one_layer_model import OneLayerModel, compute_dtype
from autoglm_compress.forward.statistics import SAMPLE_TOKENS
from autoglm_compress.forward.walk import walk
from autoglm_compress.runtime import Runtime

TOKEN_SLICE = 64
"""Tokens whose states at all boundaries are compared at once: 78 MB in fp64 for 37 boundaries, 4,096 wide."""
GREEDY_TOKENS = 2048
"""Tokens, at most, that `remove_greedily` sends through the model."""


def state_distances(states: Sequence[torch.Tensor], distance: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """How far apart the hidden states at every two boundaries between layers are, as a mean over tokens.

    Args:
        states: for each boundary the states of the same tokens, [tokens, hidden_size].
        distance: turns cosines into distances, elementwise; 0 for a cosine of 1.

    Returns:
        fp64 [boundaries, boundaries], symmetric.
    """
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for part in zip(*(state.split(TOKEN_SLICE) for state in states), strict=True):
        direction = nn.functional.normalize(torch.stack(part, dim=1).double(), dim=-1)
        total += distance((direction @ direction.mT).clamp(-1, 1)).sum(0)
    return (total / states[0].shape[0]).fill_diagonal_(0)


def states_memory(shape: ModelShape) -> int:
    """Bytes of the sampled states at all boundaries of a model, in 16 bits, and of a slice of them in fp64, thrice."""
    boundaries = shape.num_hidden_layers + 1
    return (2 * SAMPLE_TOKENS + 3 * 8 * TOKEN_SLICE) * shape.hidden_size * boundaries


def keep_without_block(distances: torch.Tensor, keep: int, first: int = 0) -> tuple[Indices, list[float]]:
    """The layers to keep when dropping the one contiguous block whose input and output are closest (the first of
    equals).

    Args:
        distances: [layers + 1, layers + 1] between the states before, between and after the layers.
        keep: how many layers to keep.
        first: how many of them are the first ones, whatever their distances.

    Returns:
        The kept layers, and for every layer that such a block can begin with the distance across the block.
    """
    layers = len(distances) - 1
    across = distances.diagonal(layers - keep)
    start = first + int(across[first:].argmin())
    return (*range(start), *range(start + layers - keep, layers)), across.tolist()


def keep_chain(costs: torch.Tensor, keep: int, first: int = 0) -> Indices:
    """The layers to keep so that the gaps between them cost least in all: exact, in O(keep * layers^2).

    Dynamic programming over the layers kept so far and the state that the last of them ends in.

    Args:
        costs: [layers + 1, layers + 1]; costs[i, j] is for taking state i for state j, without layers i to j - 1.
        keep: how many layers to keep.
        first: how many of them are the first ones, whatever they cost.
    """
    if first:
        rest = keep_chain(costs[first:, first:], keep - first)
        return (*range(first), *(first + layer for layer in rest))
    backwards = torch.ones_like(costs, dtype=torch.bool).tril(-1)
    forward = costs.double().masked_fill(backwards, torch.inf)
    best = torch.full((len(costs),), torch.inf, dtype=torch.float64)  # cost of reaching each state
    best[0] = 0
    origins = []
    for _ in range(keep):
        reached, origin = (best[:, None] + forward).min(0)
        origins.append(origin)
        best[1:] = reached[:-1]  # a layer that is kept leads to the next state at no cost
        best[0] = torch.inf
    state = int((best + forward[:, -1]).argmin())
    kept: list[int] = []
    for origin in reversed(origins):
        kept.append(state - 1)
        state = int(origin[state - 1])
    return tuple(reversed(kept))


def gaps(kept: Indices, layers: int) -> list[tuple[int, int]]:
    """The runs [first, stop) of layers that are not kept."""
    ends = zip((0, *(layer + 1 for layer in kept)), (*kept, layers), strict=True)
    return [(first, stop) for first, stop in ends if first < stop]


def greedy_memory(shape: ModelShape, tokens: int) -> int:
    """Bytes that `remove_greedily` holds for so many tokens: a layer, streams, and a pass or logits.

    One stream per layer, four buffers of the reference's walk and of what is sent through the layer, all fp32; five
    tensors the size of a slice's logits, and the head, of which a slice is converted.
    """
    tokens = min(tokens, GREEDY_TOKENS)
    streams = FP32 * (shape.num_hidden_layers + 4) * tokens * shape.hidden_size
    logits = FP32 * VOCABULARY_SLICE * (5 * tokens + shape.hidden_size) + shape.element_bytes * head_elements(shape)
    layer = layer_memory(shape)
    return max(layer + streams + max(pass_memory(shape, tokens), logits), walk_memory(shape, tokens))


@torch.no_grad()
def remove_greedily(
    checkpoint: Checkpoint, batches: list[torch.Tensor], keep: int, runtime: Runtime, file: Path, first: int = 0
) -> list[dict[str, float]]:
    """Remove, one after the other, the layer without which the predictions stay closest to the whole checkpoint's.

    Closeness is the mean over tokens of KL(whole || cut) of the next-token distributions. It needs no labels, and
    counts a change of any prediction, not only of what the text says next.

    A round loads each remaining layer once, in order, and sends through it one stream per candidate: all that have
    skipped a layer before it, and the one that has skipped none and becomes the candidate that skips this layer.
    Removing n of L layers costs about n (L - n/2)^2 / 2 passes of the sample through a layer.

    Args:
        checkpoint: the model to remove layers from.
        batches: token ids [batch, length]; the first rows are used, up to GREEDY_TOKENS tokens.
        keep: how many layers to keep.
        file: the file that records finished rounds, so that a killed process continues with the next one.
        first: how many first layers stay.

    Returns:
        In the order of removal, each `layer`, and the `kl_divergence` of the model without it and the layers removed
        before.

    Raises:
        UserError: no candidate gives finite predictions.
    """
    rows = torch.cat(batches)[:, :GREEDY_TOKENS]
    rows = rows[: max(1, GREEDY_TOKENS // rows.shape[1])]
    removed = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    kept = [layer for layer in range(checkpoint.shape.num_hidden_layers) if layer not in {r["layer"] for r in removed}]
    if len(kept) == keep:
        return removed
    [reference] = walk(checkpoint, [rows], None, runtime=runtime.alone(), title="reference")
    device = runtime.device
    divergence = Divergence(checkpoint, reference, device)
    model = OneLayerModel(checkpoint, device, compute_dtype(checkpoint, device))
    first_states = model.to_compute(embedded(checkpoint, rows, checkpoint.read(checkpoint.family.embedding)))
    passes = sum(left * (left + 1) // 2 for left in range(keep + 1, len(kept) + 1))
    with runtime.progress.task("remove layers", total=passes * rows.numel(), unit="layer-tokens") as advance:
        while len(kept) > keep:
            streams = _skip_each(model, kept, first_states, rows, advance)
            changes = divergence.of(streams).nan_to_num(nan=torch.inf, posinf=torch.inf)
            changes[:first] = torch.inf
            index = int(changes.argmin())
            if changes[index].isinf():
                raise UserError(f"{checkpoint.folder}: without any one layer, logits are NaN or infinite.")
            removed.append({"layer": kept.pop(index), "kl_divergence": float(changes[index])})
            write_json(file, removed)
    return removed


def _skip_each(
    model: OneLayerModel,
    layers: Sequence[int],
    states: torch.Tensor,
    rows: torch.Tensor,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """The last hidden states [layers, batch, length, hidden_size] without each of some layers in turn."""
    streams = states.new_empty(len(layers), *states.shape)
    for number, layer in enumerate(layers):
        _, run = model.load(layer)
        streams[number] = states
        states = run(states, rows)
        for stream in streams[:number]:
            stream.copy_(run(stream, rows))
        advance((number + 1) * rows.numel())
    return streams
