"""Which linears get 8 bits and which get 4, under a budget: an integer programme.

Linears that read one input (q, k, v; gate, up) get the same bits, because engines fuse them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.quantization.smoothing import smoothing_pairs

FEW, MANY = 4, 8


@dataclass(frozen=True)
class Group:
    """Linears of one layer that read one input, by their names in the model."""

    layer: int
    linears: tuple[str, ...]


def groups_of(shape: ModelShape) -> list[Group]:
    """All groups of a model, in the order in which it runs."""
    found = []
    for layer in range(shape.num_hidden_layers):
        prefix = shape.family.layer_prefix(layer)
        for pair in smoothing_pairs(shape, layer):
            found.append(Group(layer, tuple(prefix + reader for reader in pair.readers)))
    return found


def with_bits(quantization: Quantization, groups: Sequence[Group], bits: Sequence[int]) -> Quantization:
    """A quantization in which the linears of each group have so many bits."""
    chosen = {name: number for group, number in zip(groups, bits, strict=True) for name in group.linears}
    schemes = {
        name: replace(scheme, bits=chosen[name]) if name in chosen else scheme
        for name, scheme in quantization.schemes.items()
    }
    return replace(quantization, schemes=schemes)


def checkpoint_bytes(shape: ModelShape, quantization: Quantization) -> int:
    """Bytes of the checkpoint under this quantization."""
    return replace(shape, quantization=quantization).bytes


def average_bits(shape: ModelShape, schemes: Mapping[str, Scheme]) -> float:
    """Bits per weight of the layers' quantized linears, without scales."""
    weights, bits = 0, 0
    for name, (rows, columns) in shape.linear_shapes():
        if name in schemes:
            weights += rows * columns
            bits += rows * columns * schemes[name].bits
    return bits / weights


def allocate(costs: Sequence[float], sizes: Sequence[int], budget: int) -> list[bool]:
    """Which groups get more bits, so that the total cost of the other groups is minimal within a budget.

    Args:
        costs: the cost of leaving a group at few bits.
        sizes: the part of the budget that more bits for a group take.
        budget: in the unit of the sizes, 0 or more.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(sizes) <= budget:
        return [True] * len(costs)
    # In units near 1: the solver's tolerances are absolute.
    gains, scale = np.asarray(costs) / max(max(costs), 1e-30), max(sizes)
    possible = np.asarray([size <= budget for size in sizes], dtype=float)
    constraints = [LinearConstraint(np.asarray(sizes)[None] / scale, ub=budget / scale)]
    while True:
        solved = milp(
            -gains,
            integrality=np.ones_like(gains),
            bounds=Bounds(0, possible),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        chosen = np.round(solved.x)
        if sum(size for size, more in zip(sizes, chosen, strict=True) if more) <= budget:
            return [bool(more) for more in chosen]
        # The choice exceeds the budget within the solver's tolerance: exclude it and all choices that contain it.
        constraints.append(LinearConstraint(chosen[None], ub=chosen.sum() - 1))
