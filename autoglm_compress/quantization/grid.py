"""The values that a quantized weight can take: a scale per group of input features, and perhaps a zero point.

weight ~ (q - zero) * scale with integers q and zero in [-2^(bits-1), 2^(bits-1) - 1]; a symmetric grid has no zero
points. Scales are rounded to the dtype they are stored in before anything is rounded to the grid: so an engine
dequantizes to exactly the values that were chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autoglm_compress.architecture import Scheme

SHRINKS = tuple(1 - 0.05 * step for step in range(11))
"""Shares of a group's range that its grid may cover; values outside are clipped."""
FINE_STEP = 0.025
"""A group's best share is then compared with those that are so much smaller and larger."""
ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Grid:
    """Scales [out, groups] in the dtype they are stored in, and zero points [out, groups], int8 (None: all zero)."""

    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The int8 integers [out, in] of the grid's values nearest to a weight [out, in]."""
        return self._nearest(weight).to(torch.int8).flatten(1)

    def values(self, integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What integers [out, in] stand for, computed in a dtype as an engine would."""
        grouped = integers.to(dtype).unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            grouped = grouped - self.zeros.to(dtype).unsqueeze(-1)
        return (grouped * self.scales.to(dtype).unsqueeze(-1)).flatten(1)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The grid's values [out, in] nearest to a weight [out, in], in the weight's dtype."""
        nearest = self._nearest(weight)
        if self.zeros is not None:
            nearest.sub_(self.zeros.unsqueeze(-1))
        return nearest.mul_(self.scales.to(weight.dtype).unsqueeze(-1)).flatten(1)

    def rows(self, which: slice | torch.Tensor) -> "Grid":
        """The grid of some outputs."""
        return Grid(self.bits, self.scales[which], None if self.zeros is None else self.zeros[which])

    def divided(self, first_row: int, by: torch.Tensor) -> "Grid":
        """The grid with the values of each row, from a given row on, divided by one number.

        Scales are rounded to their dtype anew.
        """
        scales = torch.cat([self.scales[:first_row], self._divided_scales(first_row, by)])
        return Grid(self.bits, scales, self.zeros)

    def can_be_divided(self, first_row: int, by: torch.Tensor) -> torch.Tensor:
        """The rows [out - first_row] whose scales all stay in the precise range of their dtype."""
        smallest = self.scales[first_row:].abs().clamp(max=torch.finfo(self.scales.dtype).smallest_normal)
        divided = self._divided_scales(first_row, by)
        return (divided.isfinite() & (divided.abs() >= smallest)).all(1)

    def _divided_scales(self, first_row: int, by: torch.Tensor) -> torch.Tensor:
        return (self.scales[first_row:].float() / by.unsqueeze(1)).to(self.scales.dtype)

    def _nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Integers [out, groups, group_size] in the weight's dtype."""
        steps = weight.unflatten(1, (self.scales.shape[1], -1)) / self.scales.to(weight.dtype).unsqueeze(-1)
        if self.zeros is not None:
            steps.add_(self.zeros.unsqueeze(-1))
        return steps.round_().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)


def grid_for(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float | torch.Tensor = 1.0) -> Grid:
    """The grid that covers a share of the range of each group of a weight [out, in].

    Symmetric: the value of the largest magnitude is mapped to 1/2 - 2^(bits-1), so that no value is off by more than
    half a step; the scale is negative where that value is positive, as the integers reach one step further below zero
    than above. Asymmetric: the range from the smallest value, or 0, to the largest, or 0.

    Args:
        weight: fp32; `scheme.group_size` must divide `in`.
        scheme: bits, group size, and whether there are zero points.
        dtype: of the scales. A group of zeros gets scale 1.
        shrink: the share of the range that is covered, of all groups or of each [out, groups].
    """
    grouped = weight.unsqueeze(1) if scheme.group_size == -1 else weight.unflatten(1, (-1, scheme.group_size))
    if scheme.symmetric:
        lowest, highest = grouped.amin(-1), grouped.amax(-1)
        extreme = torch.where(highest.abs() > lowest.abs(), highest, lowest)
        return Grid(scheme.bits, _scales(extreme * (shrink / (0.5 - 2 ** (scheme.bits - 1))), dtype), None)
    lowest, highest = grouped.amin(-1).clamp_(max=0) * shrink, grouped.amax(-1).clamp_(min=0) * shrink
    scales = _scales((highest - lowest) / (2**scheme.bits - 1), dtype)
    bottom, top = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    zeros = (bottom - lowest / scales.to(weight.dtype)).round_().clamp_(bottom, top)
    return Grid(scheme.bits, scales, zeros.to(torch.int8))


def _scales(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    stored = exact.to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def clipped_grid(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, column_weights: torch.Tensor) -> Grid:
    """The grid that rounds each group with the least error, among grids that cover SHRINKS of its range, or FINE_STEP
    beside the best of these.

    Args:
        weight: [out, in], fp32.
        scheme: bits, group size, and whether there are zero points.
        dtype: of the scales.
        column_weights: weight of each input feature's squared error, [in].
    """
    grids = [_clipped(weight[rows], scheme, dtype, column_weights) for rows in row_parts(weight)]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(scheme.bits, torch.cat([grid.scales for grid in grids]), torch.cat(zeros) if zeros else None)


def row_parts(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight [out, in], small enough that a few copies of a slice need little memory."""
    rows = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    return (slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows))


def _clipped(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, column_weights: torch.Tensor) -> Grid:
    best = grid_for(weight, scheme, dtype)
    least = _group_errors(weight, best, column_weights)
    shrinks = torch.ones_like(least)

    def consider(candidates: torch.Tensor) -> None:
        nonlocal best, least, shrinks
        grid = grid_for(weight, scheme, dtype, candidates)
        errors = _group_errors(weight, grid, column_weights)
        better = errors < least
        least, shrinks = torch.where(better, errors, least), torch.where(better, candidates, shrinks)
        scales = torch.where(better, grid.scales, best.scales)
        zeros = None if best.zeros is None or grid.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best = Grid(scheme.bits, scales, zeros)

    for shrink in SHRINKS[1:]:
        consider(torch.full_like(shrinks, shrink))
    coarse = shrinks
    for step in (-FINE_STEP, FINE_STEP):
        consider(coarse + step)
    return best


def _group_errors(weight: torch.Tensor, grid: Grid, column_weights: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of rounding, [out, groups]."""
    error = grid.rounded(weight).sub_(weight).square_().mul_(column_weights)
    return error.unflatten(1, (grid.scales.shape[1], -1)).sum(-1)
