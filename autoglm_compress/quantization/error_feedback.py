"""Rounding with error feedback: what rounding one input feature does to the outputs, the next ones make up for.

This is GPTQ (Frantar et al. 2023) in the form of Babai's nearest-plane rounding, which gives the same integers without
the inverse of the Gram matrix (Chen et al. 2025, "The Geometry of LLM Quantization"). With G = L L^T, L lower
triangular, the outputs' error tr(dW G dW^T) is the squared size of dW L, and column j of dW L has to do with the
features from j on. So the features are rounded from the last to the first, each to make its column as small as it
can. The features are put in order of their size, the largest last: what is rounded first is rounded best.
"""

from dataclasses import dataclass

import torch

from autoglm_compress.quantization.grid import Grid

DAMPING = 1e-2
"""Of the mean of the Gram matrix's diagonal, added to it."""
BLOCK = 128


@dataclass(frozen=True)
class Feedback:
    """The factor of a Gram matrix, in an order of its features.

    `order` [features] are the features in that order; `unit` [features, features] is L with its columns divided by the
    diagonal, zero above it; `conditional` [features] has, for each feature in its own place, the squared diagonal of
    L: how much rounding it costs after the features rounded later made up for what they can.
    """

    order: torch.Tensor
    unit: torch.Tensor
    conditional: torch.Tensor

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """The squared size of the outputs' change, tr(delta G delta^T), for a change [rows, in]; G is damped."""
        products = delta[:, self.order] @ self.unit
        return products.square_().mul_(self.conditional[self.order]).sum()

    def scaled(self, scale: torch.Tensor) -> "Feedback":
        """That of the inputs divided by a scale [features]. It takes the place of this one, whose memory it uses."""
        ordered = scale[self.order]
        self.unit.mul_(ordered).div_(ordered[:, None])
        return Feedback(self.order, self.unit, self.conditional / scale.square())


def feedback_of(gram: torch.Tensor) -> Feedback:
    """Factor a Gram matrix [features, features], fp32.

    A matrix that is not positive definite in fp32 (dead features, fewer tokens than features) gets ten times the
    damping until it is.
    """
    order = gram.diagonal().argsort(stable=True)
    ordered = gram.index_select(0, order)
    damping = DAMPING * float(gram.diagonal().double().mean().clamp(min=torch.finfo(gram.dtype).tiny))
    for rows in ordered.split(BLOCK):
        rows.copy_(rows.index_select(1, order))
    ordered.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(ordered)
    while failed:
        ordered.diagonal().add_(9 * damping)
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(ordered)
    diagonal = factor.diagonal().clone()
    conditional = torch.empty_like(diagonal)
    conditional[order] = diagonal.square()
    return Feedback(order, factor.div_(diagonal), conditional)


def round_with_feedback(weight: torch.Tensor, grid: Grid, feedback: Feedback) -> torch.Tensor:
    """Round a weight [out, in] (fp32) to a grid so that the outputs change little.

    Returns:
        int8 integers [out, in].
    """
    features = weight.shape[1]
    lowest, highest = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    columns = weight.T[feedback.order]
    group_of = (feedback.order // (features // grid.scales.shape[1])).tolist()
    scales = grid.scales.T.to(weight.dtype).contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.to(weight.dtype).contiguous()
    errors, integers = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.int8)
    for stop in range(features, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        aims = columns[start:stop] - feedback.unit[stop:, start:stop].T @ errors[stop:]
        for feature in range(stop - 1, start - 1, -1):
            aim, scale = aims[feature - start], scales[group_of[feature]]
            if feature + 1 < stop:
                aim = torch.addmv(
                    aim, errors[feature + 1 : stop].T, feedback.unit[feature + 1 : stop, feature], alpha=-1
                )
            zero = 0 if zeros is None else zeros[group_of[feature]]
            nearest = (aim / scale).add_(zero).round_().clamp_(lowest, highest)
            integers[feature] = nearest
            torch.sub(nearest.sub_(zero).mul_(scale), columns[feature], out=errors[feature])
    rounded = torch.empty_like(integers)
    rounded[feedback.order] = integers
    return rounded.T.contiguous()
