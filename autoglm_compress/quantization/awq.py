"""The AWQ scale search in closed form: no forward passes, at a cost that does not depend on the number of tokens.

For linears that read the inputs X [tokens, in], rounding W to Q(W) changes their outputs by X (Q(W) - W)^T. With the
Gram matrix G = X^T X its squared size is tr(dW G dW^T), so G is all that is kept of the tokens. With columns scaled by
s the engine computes Q(W s) / s, hence dW = Q(W s) / s - W. Candidates for s are those of AWQ (Lin et al. 2023) and of
AutoAWQ's search, which adds the weights' term.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization.error_feedback import Feedback
from autoglm_compress.quantization.grid import grid_for
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.smoothing import Pair

STEPS = 20
ROW_SHARE = 8
FEWEST_ROWS, MOST_ROWS = 64, 512
SMALLEST_IMPORTANCE = 1e-4
"""The least activation of a channel, relative to the mean channel. Without it, dead channels would stretch the range of
the scales.
"""


@dataclass(frozen=True)
class Candidate:
    """A scale [channels] and its candidate. alpha = 0 without the weights' term is the identity."""

    alpha: float
    weight_term: bool
    scale: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """The best candidate, the outputs' squared size, and the relative errors with plain rounding and with the
    candidate.
    """

    candidate: Candidate
    size: float
    error_rounding: float
    error: float


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
    absolute: torch.Tensor,
    measure: Feedback | InputStatistics,
    pair: Pair,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Choice:
    """The candidate with the least output error over the weights [out, in] that read the same inputs.

    The errors are those of `sampled_rows`, which rank the candidates as all rows do. The identity is among the
    candidates, so on these rows the best is no worse than plain rounding.

    Args:
        weights: of the linears.
        absolute: sums over the tokens that they read of |x|, [in].
        measure: measures the outputs' error for an error of the weights. With error feedback it counts only the error
            that feedback cannot correct, which is also faster to compute.
        pair: the smoothing pair that the linears are the readers of.
        scheme: how they are to be quantized.
        dtype: of the scales of their groups.
    """
    sample = torch.cat([sampled_rows(weight) for weight in weights]).float()
    size = measure.output_error(sample).clamp(min=torch.finfo(sample.dtype).tiny)
    conditional = measure.conditional if isinstance(measure, Feedback) else None
    absolute = pair.averaged(absolute)
    importance = pair.averaged(column_importance(sample, scheme.group_size))
    tried = []
    for candidate in candidate_scales(absolute, importance):
        columns = pair.spread(candidate.scale)
        scaled = sample * columns
        delta = grid_for(scaled, scheme, dtype).rounded(scaled).div_(columns).sub_(sample)
        error = measure.output_error(delta) if conditional is None else delta.square_().mul_(conditional).sum()
        tried.append((float(error / size), candidate))
    least, best = min(tried, key=lambda entry: entry[0])
    return Choice(best, float(size), error_rounding=tried[0][0], error=least)


def sampled_rows(weight: torch.Tensor) -> torch.Tensor:
    """About an eighth of the rows of a weight [out, in], evenly spaced, within a lower and an upper limit."""
    rows = weight.shape[0]
    return weight[:: max(1, rows // min(max(rows // ROW_SHARE, FEWEST_ROWS), MOST_ROWS))]
