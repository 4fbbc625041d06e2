"""The AWQ scale search in closed form: no forward passes, at a cost that does not depend on the number of tokens.

For linears that read the inputs X [tokens, in], rounding W to Q(W) changes their outputs by X (Q(W) - W)^T. With the
Gram matrix G = X^T X its squared size is tr(dW G dW^T), so G is all that is kept of the tokens. With columns scaled by
s the engine computes Q(W s) / s, hence dW = Q(W s) / s - W. Candidates for s are those of AWQ (Lin et al. 2023) and of
AutoAWQ's search, which adds the weights' term.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.quantization.rounding import dequantize, quantize_symmetric
from autoglm_compress.quantization.smoothing import Pair

STEPS = 20
ROW_STRIDE = 8
MIN_ROWS = 64
GRAM_BLOCK = 1024
SMALLEST_IMPORTANCE = 1e-4
"""Of a channel, relative to the mean channel: dead channels must not stretch the range of the scales."""


class InputStatistics:
    """What the search needs to know of the inputs of linears: sums over tokens of x x^T and |x|, in fp32."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._upper = torch.zeros(features, features, device=device)
        self.absolute = torch.zeros(features, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs [..., features] of some tokens."""
        x = inputs.flatten(0, -2).float()
        self.absolute += x.abs().sum(0)
        # The matrix is symmetric: only its upper blocks are computed.
        for start in range(0, x.shape[1], GRAM_BLOCK):
            self._upper[start : start + GRAM_BLOCK, start:].addmm_(x[:, start : start + GRAM_BLOCK].T, x[:, start:])

    @property
    def finite(self) -> bool:
        """Whether all inputs were finite: a NaN or infinite one leaves its mark on the diagonal."""
        return bool(self._upper.diagonal().isfinite().all())

    def gram(self) -> torch.Tensor:
        """The Gram matrix [features, features]."""
        for start in range(GRAM_BLOCK, self._upper.shape[0], GRAM_BLOCK):
            rows = slice(start, start + GRAM_BLOCK)
            self._upper[rows, :start] = self._upper[:start, rows].T
        return self._upper


@dataclass(frozen=True)
class Candidate:
    """A scale [channels] and where it came from; alpha 0 without the weights' term is the identity."""

    alpha: float
    weight_term: bool
    scale: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """The best candidate, and the error of the outputs relative to their size, with plain rounding and with it."""

    candidate: Candidate
    error_rounding: float
    error: float


def output_error(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The squared size of the outputs' change, tr(delta gram delta^T), for a change [rows, in] of the weights."""
    return ((delta @ gram) * delta).sum()


def column_importance(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Per column of a weight [rows, in], the mean of |w| relative to the largest in its group (AutoAWQ)."""
    groups = 1 if group_size == -1 else weight.shape[1] // group_size
    grouped = weight.abs().unflatten(1, (groups, -1))
    largest = grouped.amax(-1, keepdim=True).clamp_(min=torch.finfo(weight.dtype).tiny)
    return (grouped / largest).mean(0).flatten()


def candidate_scales(absolute: torch.Tensor, importance: torch.Tensor) -> Iterator[Candidate]:
    """The identity, then |x|^alpha and |x|^alpha / w^(1 - alpha) on a grid of alphas, normalised by sqrt(max * min).

    Args:
        absolute: sum or mean of |x| per channel [channels].
        importance: `column_importance` per channel [channels].
    """
    x, w = (v / v.mean().clamp(min=torch.finfo(v.dtype).tiny) for v in (absolute, importance))
    x, w = x.clamp(min=SMALLEST_IMPORTANCE), w.clamp(min=SMALLEST_IMPORTANCE)
    for step in range(STEPS + 1):
        alpha = step / STEPS
        yield Candidate(alpha, False, _normalised(x.pow(alpha)))
        if step < STEPS:
            yield Candidate(alpha, True, _normalised(x.pow(alpha) / w.pow(1 - alpha)))


def _normalised(scale: torch.Tensor) -> torch.Tensor:
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weights: Sequence[torch.Tensor],
    inputs: InputStatistics,
    pair: Pair,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Choice:
    """The candidate with the least output error over the weights [out, in] (fp32) that read the same inputs.

    The errors are those of every eighth output row (of all rows of small matrices), which ranks the candidates as all
    rows do. The identity is among the candidates, so on these rows none is worse than plain rounding.
    """
    sample = torch.cat([every_few_rows(weight) for weight in weights])
    gram = inputs.gram()
    size = output_error(sample, gram).clamp(min=torch.finfo(gram.dtype).tiny)
    absolute = pair.averaged(inputs.absolute)
    importance = pair.averaged(column_importance(sample, group_size))
    tried = []
    for candidate in candidate_scales(absolute, importance):
        columns = pair.spread(candidate.scale)
        scaled = dequantize(*quantize_symmetric(sample * columns, bits, group_size, dtype), sample.dtype)
        error = output_error(scaled.div_(columns).sub_(sample), gram)
        tried.append((float(error / size), candidate))
    error, best = min(tried, key=lambda entry: entry[0])
    return Choice(best, error_rounding=tried[0][0], error=error)


def every_few_rows(weight: torch.Tensor) -> torch.Tensor:
    """Every eighth row of a weight [out, in], or as many more as make `MIN_ROWS`."""
    return weight[:: max(1, min(ROW_STRIDE, weight.shape[0] // MIN_ROWS))]
