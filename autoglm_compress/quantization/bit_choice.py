"""The bits of every linear: as the options say, or for `bits: auto` those that cost least within the budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.architecture.quantization import COMPRESSED_TENSORS
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import PlanError
from autoglm_compress.quantization.bit_allocation import (
    FEW,
    MANY,
    Group,
    allocate,
    average_bits,
    checkpoint_bytes,
    groups_of,
    with_bits,
)
from autoglm_compress.quantization.options import Budget, QuantizationOptions
from autoglm_compress.quantization.sensitivity import divergences
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class BitChoice:
    """A quantization of a model, and for each group of linears its bits and the cost of 4 bits."""

    quantization: Quantization
    average_bits: float
    groups: list[dict[str, Any]]


def uniform(options: QuantizationOptions, shape: ModelShape) -> Quantization:
    """All linears with the requested bits, or with the fewest of `auto`."""
    symmetric = options.format == COMPRESSED_TENSORS if options.symmetric is None else options.symmetric
    scheme = Scheme(FEW if options.bits == "auto" else options.bits, options.group_size, symmetric)
    schemes = {name: scheme for name, _ in shape.linear_shapes()}
    if options.head_bits == MANY:
        schemes[shape.family.roles.head] = Scheme(MANY, -1)
    return Quantization(options.format, schemes, tower_schemes(options, shape))


def tower_schemes(options: QuantizationOptions, shape: ModelShape) -> dict[str, Scheme]:
    """The schemes of linears of towers beside the text, by their names."""
    chosen = [tower for tower in shape.kept if tower.name in options.towers]
    return {module: Scheme(options.towers[tower.name].bits, -1) for tower in chosen for module in tower.linears}


def with_rounded_towers(options: QuantizationOptions, shape: ModelShape) -> ModelShape:
    """The shape with towers as they are rounded, and the text tower as it is.

    An adapter stays shared if it is rounded alike in all its places.
    """
    quantization = Quantization(options.format, {}, tower_schemes(options, shape))
    kept = tuple(tower.rounded(quantization, shape.element_bytes) for tower in shape.kept)
    schemes = [quantization.towers.get(each.linear) for each in shape.family.projections.values()]
    alike = all(scheme == schemes[0] for scheme in schemes)
    return replace(shape, kept=kept, shared_adapter=shape.shared_adapter and alike)


def planned(options: QuantizationOptions, shape: ModelShape) -> Quantization:
    """The quantization as far as it is known before a run. With a budget, the first linears have 8 bits for now.

    Raises:
        PlanError: 4 bits everywhere are over the budget.
    """
    quantization = uniform(options, shape)
    if options.budget is None:
        return quantization
    groups = groups_of(shape)
    sizes, left = _budget_left(options.budget, shape, quantization, groups)
    if left < 0:
        least = checkpoint_bytes(shape, quantization)
        raise PlanError("budget", f"too small: with 4 bits everywhere the checkpoint has {least} bytes")
    bits = []
    for size in sizes:
        bits.append(MANY if size <= left else FEW)
        left -= size if bits[-1] == MANY else 0
    return with_bits(quantization, groups, bits)


def choose_bits(
    options: QuantizationOptions, source: Checkpoint, batches: list[torch.Tensor], runtime: Runtime, file: Path
) -> BitChoice:
    """The bits with the least cost within the budget. The cost of a group is the divergence of the predictions at 4
    bits.

    Args:
        options: with a budget.
        source: the unquantized model.
        batches: token ids [batch, length].
        runtime: where to compute.
        file: the file that keeps the measurements.

    Raises:
        UserError: the predictions are not finite.
    """
    shape = with_rounded_towers(options, source.shape)
    quantization, groups = uniform(options, shape), groups_of(shape)
    costs = divergences(source, quantization, groups, batches, runtime, file)
    assert options.budget is not None  # the options are refused without one where the bits are to be chosen
    sizes, left = _budget_left(options.budget, shape, quantization, groups)
    bits = [MANY if more else FEW for more in allocate(costs, sizes, left)]
    chosen = with_bits(quantization, groups, bits)
    found = [
        {
            "layer": group.layer,
            "parts": [shape.family.place(linear).name for linear in group.linears],
            "linears": list(group.linears),
            "bits": number,
            "divergence_at_4_bits": float(f"{cost:.4g}"),
        }
        for group, number, cost in zip(groups, bits, costs, strict=True)
    ]
    return BitChoice(chosen, average_bits(shape, chosen.schemes), found)


def _budget_left(
    budget: Budget, shape: ModelShape, quantization: Quantization, groups: Sequence[Group]
) -> tuple[list[int], int]:
    """The part of the budget that more bits for each group take, and the budget that 4 bits everywhere leave."""
    shapes = dict(shape.linear_shapes())
    weights = [sum(prod(shapes[name]) for name in group.linears) for group in groups]
    if budget.bytes is None:
        assert budget.average_bits is not None  # a budget is one or the other
        left = (budget.average_bits - FEW) * sum(weights)
        return [(MANY - FEW) * number for number in weights], int(left)
    left = budget.bytes - checkpoint_bytes(shape, quantization)
    more = with_bits(quantization, groups, [MANY] * len(groups))

    def stored(chosen: Quantization, group: Group) -> int:
        return sum(chosen.matrix_bytes(name, shapes[name], shape.element_bytes) for name in group.linears)

    return [stored(more, group) - stored(quantization, group) for group in groups], left
