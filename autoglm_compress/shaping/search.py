"""The search for the sizes that cost the predictions least: few shapes are really cut, the others are predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autoglm_compress.architecture import ModelShape
from autoglm_compress.shaping.costs import Axis, Place, cheapest, even_costs, largest_within, total_costs, weighted
from autoglm_compress.shaping.grid import Grid
from autoglm_compress.shaping.removed import DEPTH_METHODS, Removed

TRIALS = 8
"""Shapes within the target that are cut and measured."""
MOST_MEASURED = TRIALS + 2 * (len(DEPTH_METHODS) + 3)
"""Shapes that are cut in all: two along each size alone, and along layers by each method."""
NEGLIGIBLE = 1e-9
"""A removed share below which nothing is removed but for rounding."""
SURE = 0.1
"""The least share of a measured cost that is left to a size when others change with it."""

Measure = Callable[[Place, str], float]
"""What a shape costs when its layers are chosen by a method: the divergence of its predictions, in nats."""


@dataclass(frozen=True)
class Trial:
    """A shape within the target, what it was expected to cost and what it was measured to cost."""

    place: Place
    expected: float
    divergence: float


@dataclass(frozen=True)
class Found:
    """The method that layers are chosen by, how cost grows along each size, and the trials, the best one first."""

    depth_method: str
    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial that costs least."""
        return self.trials[0]


def even_place(grid: Grid, limit: int) -> Place | None:
    """The shape within a limit that is cut most evenly. None if all are larger."""
    source, (streams, neurons, layers) = grid.source, grid.sizes.shape
    ratios = [
        np.array([stream.heads / source.num_attention_heads for stream in grid.streams]).reshape(-1, 1, 1),
        np.array([stream.hidden / source.hidden_size for stream in grid.streams]).reshape(-1, 1, 1),
        (np.array(grid.neurons) / source.intermediate_size).reshape(1, -1, 1),
        (np.array(grid.layers) / source.num_hidden_layers).reshape(1, 1, -1),
    ]
    # KV heads stay where a shape that keeps them all is within the limit.
    costs = even_costs(ratios, (streams, neurons, layers))
    lost = np.array([1 - stream.key_value_heads / source.num_key_value_heads for stream in grid.streams])
    return cheapest(costs + lost.reshape(-1, 1, 1), grid.sizes, largest_within(grid.sizes, limit))


def find_shape(grid: Grid, removed: Removed, limit: int, measure: Measure) -> Found:
    """Measure how cost grows along each size, then the shapes that are expected to cost least.

    Of the trials one is the shape cut most evenly, and one the best that leaves heads and width alone. Each other one
    is the best by all that is known when it is chosen.

    Args:
        grid: the shapes; one of them is within the limit.
        removed: what is removed along each size.
        limit: the largest size.
        measure: cuts and measures a shape; called a few times for each size, and for every trial.
    """
    share = limit / grid.size(grid.source)
    method, axes = _probed(grid, removed, share, measure)
    everywhere = largest_within(grid.sizes, limit)
    heads_and_width_whole = everywhere.copy()
    heads_and_width_whole[:-1] = False
    allowed = (everywhere, heads_and_width_whole)
    measured: dict[Place, float] = {}
    trials = []
    for number in range(TRIALS):
        now = weighted(axes, measured)
        costs = total_costs(now, grid.sizes.shape)
        place = even_place(grid, limit) if number == 1 else cheapest(costs, grid.sizes, allowed[number == 2])
        if place is None or place in measured:
            continue
        measured[place] = measure(place, method)
        trials.append(Trial(place, float(costs[place]), measured[place]))
        for left in allowed:
            left[place] = False
    trials.sort(key=lambda trial: trial.divergence)
    return Found(method, tuple(weighted(axes, measured)), tuple(trials))


def _probed(grid: Grid, removed: Removed, share: float, measure: Measure) -> tuple[str, list[Axis]]:
    """The better method for layers, and every size's axis through measured shapes that are cut along it."""
    whole = tuple(size - 1 for size in grid.sizes.shape)
    wanted = ((1 + share) / 2, share)
    depth: dict[str, tuple[float, Axis]] = {}
    for method, values in removed.layers.items():
        axis = Axis("layers", _negligible(values).reshape(1, 1, -1))
        places = [(*whole[:2], layer) for layer in range(len(grid.layers))]

        def by_method(place: Place, method: str = method) -> float:
            return measure(place, method)

        points = _points(grid, axis, [], places, wanted, by_method)
        cost = float(np.mean([np.log(max(found, NEGLIGIBLE)) for _, found in points])) if points else 0.0
        depth[method] = cost, axis.through(points)
    best = min(depth, key=lambda method: depth[method][0])
    known = [depth[best][1]]
    places = [(whole[0], neuron, whole[2]) for neuron in range(len(grid.neurons))]
    axes = [(Axis("neurons", _negligible(removed.neurons).reshape(1, -1, 1)), places)]
    axes += _stream_axes(grid, removed, whole)
    for axis, places in axes:
        known.append(axis.through(_points(grid, axis, known, places, wanted, lambda place: measure(place, best))))
    return best, known


def _stream_axes(grid: Grid, removed: Removed, whole: Place) -> list[tuple[Axis, list[Place]]]:
    """Heads and directions with the places to measure each at, or one axis where no shape loses heads alone."""
    heads, directions = _negligible(removed.heads), _negligible(removed.directions)
    last = grid.streams[-1]

    def places(chosen: np.ndarray) -> list[Place]:
        return [(int(stream), *whole[1:]) for stream in np.flatnonzero(chosen)]

    widest = np.array([stream.hidden == last.hidden for stream in grid.streams])
    narrower = ~widest
    alone = widest & (heads > 0)
    if narrower.any() and not alone.any():
        return [(Axis("heads and directions", (heads + directions).reshape(-1, 1, 1)), places(narrower))]
    # Where none is narrower alone, those that lose fewest heads show best what the width costs.
    for width in {stream.hidden for stream in grid.streams}:
        same = np.array([stream.hidden == width for stream in grid.streams])
        narrower &= ~same | (heads <= heads[same].min())
    return [
        (Axis("heads", heads.reshape(-1, 1, 1)), places(alone)),
        (Axis("directions", directions.reshape(-1, 1, 1)), places(narrower)),
    ]


def _negligible(shares: np.ndarray) -> np.ndarray:
    return np.where(shares < NEGLIGIBLE, 0.0, shares)


def _points(
    grid: Grid,
    axis: Axis,
    known: Sequence[Axis],
    places: Sequence[Place],
    wanted: Sequence[float],
    measure: Callable[[Place], float],
) -> list[tuple[float, float]]:
    """What is removed along an axis and what that costs, at the places nearest to the wanted shares of its size."""
    places = [place for place in places if axis.at(axis.removed, place) > 0]
    chosen: list[Place] = []
    for share in wanted:
        left = [place for place in places if place not in chosen]
        if left:
            chosen.append(min(left, key=lambda place: abs(_kept(grid.shape(place), grid.source) - share)))
    found = []
    for place in chosen:
        cost = measure(place)
        others = sum(other.at(other.costs, place) for other in known)
        found.append((axis.at(axis.removed, place), max(cost - others, SURE * cost)))
    return found


def _kept(shape: ModelShape, source: ModelShape) -> float:
    """The share that is left of the size that is cut most."""
    return min(kept / source.cut_sizes[name] for name, kept in shape.cut_sizes.items())
