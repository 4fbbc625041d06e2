"""Rounding with error feedback: later input features correct the outputs' error from rounding earlier ones.

This is GPTQ (Frantar et al. 2023) in the form of Babai's nearest-plane rounding, which gives the same integers without
the inverse of the Gram matrix (Chen et al. 2025, "The Geometry of LLM Quantization"). With G = L L^T, L lower
triangular, the outputs' error tr(dW G dW^T) is the squared size of dW L, and column j of dW L has to do with the
features from j on. The features are therefore rounded from the last to the first, and each makes its column as small as
possible. The features are sorted by size with the largest last, because features that are rounded first are rounded
best.
"""

from dataclasses import dataclass

import torch

from autoglm_compress.quantization.grid import Grid, row_parts
from autoglm_compress.quantization.input_statistics import blocks, fast_products

DAMPING = 3e-2
"""Damping: this share of the mean of the Gram matrix's diagonal is added to the diagonal.

Less fits the calibration's rows no better once scales are refitted, and costs other text more; three times as much is
better still for text of other kinds, and worse for the calibration's own.
"""
BLOCK = 16
"""Features of a block, which are rounded one after the other. Matrix products pass errors on between blocks."""


@dataclass(frozen=True)
class Feedback:
    """The factor of a Gram matrix, in an order of its features.

    `order` [features] are the features in that order; `unit` [features, features] is L with its columns divided by the
    diagonal, zero above it; `conditional` [features] has, for each feature in its own place, the squared diagonal of L:
    the cost of rounding it, after the features rounded later have corrected what they can.
    """

    order: torch.Tensor
    unit: torch.Tensor
    conditional: torch.Tensor

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """The squared size of the outputs' change, tr(delta G delta^T), for a change [rows, in]; G is damped."""
        delta, conditional = delta[:, self.order], self.conditional[self.order]
        error = torch.zeros((), device=delta.device)
        with fast_products():
            for block in blocks(len(self.order)):
                products = delta[:, block.start :] @ self.unit[block.start :, block]
                error += products.square_().mul_(conditional[block]).sum()
        return error

    def scaled(self, scale: torch.Tensor) -> "Feedback":
        """The factor for the inputs divided by a scale [features]. It overwrites this one."""
        ordered = scale[self.order]
        self.unit.mul_(ordered).div_(ordered[:, None])
        return Feedback(self.order, self.unit, self.conditional / scale.square())


def feedback_of(gram: torch.Tensor) -> Feedback:
    """Factor a Gram matrix [features, features], fp32. The result overwrites it.

    A matrix that is not positive definite in fp32 (dead features, fewer tokens than features) gets ten times the
    damping until it is.
    """
    order = gram.diagonal().argsort(stable=True)
    damping = DAMPING * float(gram.diagonal().double().mean().clamp(min=torch.finfo(gram.dtype).tiny))
    for block in blocks(len(gram)):
        gram[:, block] = gram[:, block].index_select(0, order)
    for block in blocks(len(gram)):
        gram[block] = gram[block].index_select(1, order)
    diagonal = gram.diagonal().clone()
    while not _factor(gram, diagonal + damping):
        damping *= 10
    diagonal = gram.diagonal().clone()
    conditional = torch.empty_like(diagonal)
    conditional[order] = diagonal.square()
    return Feedback(order, gram.tril_().div_(diagonal), conditional)


def _factor(matrix: torch.Tensor, diagonal: torch.Tensor) -> bool:
    """Cholesky in place: L of matrix = L L^T is written to the lower triangle and the diagonal.

    The matrix is read from its upper triangle, which stays, and from a separate diagonal.

    Returns:
        Whether the matrix is positive definite; if not, the lower triangle holds nothing of use.
    """
    for block in blocks(len(matrix)):
        corner, below = matrix[block, block], matrix[block.stop :, block]
        above = corner.triu(1)
        corner.copy_(above.T + diagonal[block].diag())
        corner.addmm_(matrix[block, : block.start], matrix[block, : block.start].T, alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(corner)
        corner.copy_(factor + above)
        if failed:
            return False
        below.copy_(matrix[block, block.stop :].T)
        below.addmm_(matrix[block.stop :, : block.start], matrix[block, : block.start].T, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(factor.T, below, upper=True, left=False))
    return True


def round_with_feedback(weight: torch.Tensor, grid: Grid, feedback: Feedback) -> torch.Tensor:
    """Round a weight [out, in] (fp32) to a grid so that the outputs change little.

    Returns:
        int8 integers [out, in].
    """
    parts = row_parts(weight)
    # A target need not be exact: its error is part of the error that earlier features correct.
    with fast_products():
        return torch.cat([_round_rows(weight[rows], grid.rows(rows), feedback) for rows in parts])


def _round_rows(weight: torch.Tensor, grid: Grid, feedback: Feedback) -> torch.Tensor:
    features = weight.shape[1]
    lowest, highest = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    group_of = (feedback.order // (features // grid.scales.shape[1])).tolist()
    scales = grid.scales.T.to(weight.dtype).contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.to(weight.dtype).contiguous()
    aims, unit = weight.T[feedback.order], feedback.unit
    errors = aims.clone()  # errors of rounded features; values of the others
    integers = torch.empty_like(aims, dtype=torch.int8)

    for done, stop in enumerate(range(features, 0, -BLOCK), 1):
        start = max(0, stop - BLOCK)
        for feature in range(stop - 1, start - 1, -1):
            aim, scale, after = aims[feature], scales[group_of[feature]], slice(feature + 1, stop)
            if feature + 1 < stop:
                aim = torch.addmv(aim, errors[after].T, unit[after, feature], alpha=-1)
            zero = 0 if zeros is None else zeros[group_of[feature]]
            nearest = (aim / scale).add_(zero).round_().clamp_(lowest, highest)
            integers[feature] = nearest
            torch.sub(nearest.sub_(zero).mul_(scale), errors[feature], out=errors[feature])
        # As many blocks as 2 divides their number by, at the end of it, go to as many before them: every block gets
        # all errors after it in time, in few and large products.
        span = (done & -done) * BLOCK
        later, earlier = slice(start, start + span), slice(max(0, start - span), start)
        aims[earlier].addmm_(unit[later, earlier].T, errors[later], alpha=-1)
    rounded = torch.empty_like(integers)
    rounded[feedback.order] = integers
    return rounded.T.contiguous()


def refit_scales(weight: torch.Tensor, integers: torch.Tensor, grid: Grid, feedback: Feedback) -> Grid:
    """The scales with which integers [out, in] change the outputs of a weight [out, in] (fp32) least, group by group.

    With the integers fixed, the outputs' error is quadratic in a row's scales. The groups take the least error's scale
    one after the other, and each corrects what the ones before it left, their rounding to the stored dtype included.
    A scale that would leave the precise range of the dtype stays as it was.
    """
    with fast_products():
        scales = [_refit_rows(weight[rows], integers[rows], grid.rows(rows), feedback) for rows in row_parts(weight)]
    return Grid(grid.bits, torch.cat(scales), grid.zeros)


def _refit_rows(weight: torch.Tensor, integers: torch.Tensor, grid: Grid, feedback: Feedback) -> torch.Tensor:
    places = feedback.order.argsort()
    weights = feedback.conditional[feedback.order]
    scales = grid.scales.clone()
    smallest = torch.finfo(scales.dtype).smallest_normal
    error = (grid.values(integers, weight.dtype).sub_(weight))[:, feedback.order] @ feedback.unit
    groups = grid.scales.shape[1]
    for group, features in enumerate(torch.arange(weight.shape[1], device=weight.device).chunk(groups)):
        steps = integers[:, features].to(weight.dtype)
        if grid.zeros is not None:
            steps = steps - grid.zeros[:, group, None].to(weight.dtype)
        outputs = steps @ feedback.unit[places[features]]
        weighted = outputs * weights
        size = (weighted * outputs).sum(1)
        change = (weighted * error).sum(1).div_(size.clamp(min=torch.finfo(size.dtype).tiny))
        before = scales[:, group].to(weight.dtype)
        after = (before - change).to(scales.dtype)
        usable = after.isfinite() & (after.abs() >= smallest) & (size > 0)
        scales[:, group] = torch.where(usable, after, scales[:, group])
        error.addcmul_(outputs, (scales[:, group].to(weight.dtype) - before)[:, None])
    return scales
