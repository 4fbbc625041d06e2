"""What each shape is expected to cost the predictions, learnt from shapes that were really cut and measured.

The cost of a shape is a sum over sizes. Along one size, the cost is a power of what is removed, through the shapes that
differ in this size alone. Shapes that differ in several then correct how much each size weighs beside the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Place = tuple[int, ...]
"""An index [stream, neurons, layers] into a grid."""

POWERS = (0.5, 4.0)
"""The least and the largest power: two measurements that are nearly equal say little."""
LEAST_COST = 1e-6
"""Nats below which a measured divergence is rounding."""
WEIGHTS = (0.2, 5.0)
PULL = 0.02
"""How much a weight is drawn to that of the others, against one measured shape."""


@dataclass(frozen=True)
class Axis:
    """One size of the grid: what its values remove, broadcastable to [streams, neurons, layers], and what that costs.

    The cost of a share e is weight * scale * e ** power.
    """

    name: str
    removed: np.ndarray
    scale: float = 1.0
    power: float = 1.0
    weight: float = 1.0

    @property
    def costs(self) -> np.ndarray:
        """The cost of each value, of the same dimensions as `removed`."""
        return self.weight * self.scale * self.removed**self.power

    def at(self, values: np.ndarray, place: Place) -> float:
        """One of `removed` or `costs`."""
        return float(values[tuple(min(index, size - 1) for index, size in zip(place, values.shape, strict=True))])

    def as_data(self) -> dict[str, float]:
        """How the cost grows with the removed share, as plain data."""
        return {"scale": self.scale, "power": self.power, "weight": self.weight}

    def through(self, points: Sequence[tuple[float, float]]) -> "Axis":
        """The axis with a cost through measured points (removed, divergence), of which there are one or two."""
        [*known] = [(share, max(cost, LEAST_COST)) for share, cost in points if share > 0]
        if not known:
            return self
        logs = np.log(np.array(known))
        spread = np.ptp(logs[:, 0])
        power = 1.0 if spread < 1e-9 else float(np.clip(np.polyfit(logs[:, 0], logs[:, 1], 1)[0], *POWERS))
        return replace(self, power=power, scale=float(np.exp(np.mean(logs[:, 1] - power * logs[:, 0]))))


def weighted(axes: Sequence[Axis], measured: Mapping[Place, float]) -> list[Axis]:
    """The axes with weights under which measured shapes cost what they were measured to cost, as nearly as they can.

    Least squares of the relative errors. All weights change by the median factor first, which does not change the order
    of shapes, and are then drawn to it, so that few measurements change what they say something about and no more.
    """
    parts = np.array([[axis.at(replace(axis, weight=1.0).costs, place) for axis in axes] for place in measured])
    found = np.maximum(np.array(list(measured.values())), LEAST_COST)
    if not len(found):
        return list(axes)
    together = float(np.median(found / np.maximum(parts.sum(1), LEAST_COST)))
    relative = together * parts / found[:, None]
    left = np.vstack([relative, PULL**0.5 * np.eye(len(axes))])
    right = np.concatenate([np.ones(len(found)), np.full(len(axes), PULL**0.5)])
    weights = np.linalg.lstsq(left, right, rcond=None)[0].clip(*WEIGHTS)
    return [replace(axis, weight=together * float(weight)) for axis, weight in zip(axes, weights, strict=True)]


def total_costs(axes: Sequence[Axis], shape: tuple[int, ...]) -> np.ndarray:
    """The cost of every shape of a grid [streams, neurons, layers]."""
    return sum((np.broadcast_to(axis.costs, shape) for axis in axes), np.zeros(shape))


def largest_within(sizes: np.ndarray, limit: float) -> np.ndarray:
    """Which shapes are within a limit and would not be with the next larger FFN or number of layers.

    Others are never better than one of these: they lose more and are smaller.

    Args:
        sizes: [streams, neurons, layers], growing along the last two.
        limit: the largest size.
    """
    within = sizes <= limit
    found = within.copy()
    found[:, :-1] &= ~within[:, 1:]
    found[:, :, :-1] &= ~within[:, :, 1:]
    return found


def cheapest(costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray) -> Place | None:
    """The place of the least cost among the allowed ones, of equal costs the largest. None if none is allowed."""
    left = np.where(allowed, costs, np.inf)
    least = left.min()
    if not np.isfinite(least):
        return None
    best = np.where(left == least, sizes, -np.inf).argmax()
    return tuple(int(index) for index in np.unravel_index(best, sizes.shape))


def even_costs(ratios: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Costs by which the cheapest shape is the one that is cut most evenly: how far what sizes keep is apart.

    Args:
        ratios: of each size what is kept, broadcastable to `shape`.
        shape: [streams, neurons, layers].
    """
    kept = np.stack([np.broadcast_to(ratio, shape) for ratio in ratios])
    apart: np.ndarray = kept.max(0) - kept.min(0)
    return apart
