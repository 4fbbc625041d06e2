"""What each size would remove, in closed form, from the statistics that the surgeries choose by.

Every measure is a share between 0 and 1 of what there is, or for layers the sum that the choice of layers minimises.
How much a share costs the predictions is measured elsewhere: these say only how the cost grows along one size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.importance import choose_heads
from autoglm_compress.cutting.layer_choice import gaps, keep_chain, state_distances
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.cutting.residual_stream import ResidualStream
from autoglm_compress.cutting.rotation import reader_shares
from autoglm_compress.forward.statistics import Statistics
from autoglm_compress.shaping.grid import Grid

DEPTH_METHODS = ("chain", "block_influence")
"""The methods of the stage `depth` that read nothing but statistics."""


@dataclass(frozen=True)
class Removed:
    """What is removed at each place along the grid's axes.

    `layers` [layers] by the method of the stage `depth`; `neurons` [neurons]; `heads` and `directions` [streams].
    """

    layers: dict[str, np.ndarray]
    neurons: np.ndarray
    heads: np.ndarray
    directions: np.ndarray


def removed(
    grid: Grid,
    source: Checkpoint,
    lineage: Lineage,
    statistics: Statistics,
    neuron_scores: Sequence[torch.Tensor],
    head_scores: Sequence[torch.Tensor],
) -> Removed:
    """What the surgeries would remove of a checkpoint.

    Args:
        grid: the sizes.
        source: the checkpoint.
        lineage: which parts of the run's source it still has.
        statistics: those of the run's source.
        neuron_scores: for each layer [intermediate_size], the norm of what a neuron adds to the residual stream.
        head_scores: for each layer [num_attention_heads], the mean square of what a head adds.
    """
    counts = {(stream.heads, stream.key_value_heads) for stream in grid.streams}
    by_heads = {count: _heads(head_scores, source.shape.num_key_value_heads, *count) for count in counts}
    stream = ResidualStream(source, lineage, statistics)
    kept = reader_shares(stream.sum_of_grams(), stream.reader_metric())
    return Removed(
        layers={method: _layers(grid, lineage, statistics, method) for method in DEPTH_METHODS},
        neurons=np.array([_neurons(neuron_scores, size) for size in grid.neurons]),
        heads=np.array([by_heads[place.heads, place.key_value_heads] for place in grid.streams]),
        directions=np.array([1 - float(kept[: place.hidden].sum()) for place in grid.streams]).clip(0),
    )


def _layers(grid: Grid, lineage: Lineage, statistics: Statistics, method: str) -> np.ndarray:
    """The least that a method finds so many layers fewer to cost [layers]."""
    have, first = grid.source.num_hidden_layers, grid.source.first_layers
    if method == "block_influence":
        scores = torch.stack([statistics.layer(layer)["block_influence"] for layer in lineage.layers])
        ascending = scores[first:].double().sort().values
        return np.array([float(ascending[: have - keep].sum()) for keep in grid.layers])
    states = [statistics.layer(layer)["boundary"] for layer in lineage.layers] + [statistics.final()["boundary"]]
    costs = state_distances(states, lambda cosine: 1 - cosine)
    kept = (keep_chain(costs, keep, first) for keep in grid.layers)
    return np.array([sum(float(costs[gap]) for gap in gaps(layers, have)) for layers in kept])


def _neurons(scores: Sequence[torch.Tensor], keep: int) -> float:
    """The share of the squares that is removed, as a mean over layers."""
    squares = [score.double().square().sort(descending=True).values for score in scores]
    return float(np.mean([float(square[keep:].sum() / square.sum().clamp_min(1e-30)) for square in squares]))


def _heads(scores: Sequence[torch.Tensor], groups: int, keep: int, keep_groups: int) -> float:
    """The share of the scores that is removed, as a mean over layers."""
    shares = []
    for score in scores:
        heads, _ = choose_heads(score, groups, keep, keep_groups)
        shares.append(1 - float(score[list(heads)].double().sum() / score.double().sum().clamp_min(1e-30)))
    return max(float(np.mean(shares)), 0.0)
