"""One linear map in the place of two or more, in closed form.

Each kind of features F_m [tokens, in], with a constant column for the bias, has a projection A_m of its own, which
gives Y_m = F_m A_m^T. The one map W for all kinds has the least sum of their squared errors, each kind's relative to
the squared distance of its outputs from their mean:

    W = (sum_m F_m^T Y_m / s_m)^T (sum_m F_m^T F_m / s_m + mu I)^-1,  s_m = |Y_m - mean|^2

with ridge towards the mean of the projections, so that directions without features keep it. As Y_m is linear in F_m,
the Gram matrices F_m^T F_m are all that is kept of the tokens.
"""

from collections.abc import Mapping

import torch

from autoglm_compress.fitting.affine import with_one
from autoglm_compress.fitting.ridge import SMALLEST_STRENGTH, STRENGTHS, Fit, Moments, fit

ByKind = Mapping[str, torch.Tensor]
"""Matrices in fp64 by the kind of features: F_m^T F_m [in + 1, in + 1], whose last element is the number of tokens, or
A_m [out, in + 1], whose last column is the bias.
"""


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    """The Gram matrix [in + 1, in + 1] in fp64 of inputs [tokens, in] with a constant."""
    augmented = with_one(inputs, True).double()
    return augmented.T @ augmented


def spread(gram: torch.Tensor, weight: torch.Tensor) -> float:
    """The mean squared distance of the outputs from their mean, for a projection [out, in + 1] in fp64."""
    tokens, mean = gram[-1, -1], weight @ gram[-1] / gram[-1, -1]
    square = ((weight @ gram) * weight).sum() / tokens
    return float((square - mean.square().sum()).clamp_min(1e-9 * square))


def relative_errors(
    weight: torch.Tensor, grams: ByKind, projections: ByKind, spreads: Mapping[str, float]
) -> dict[str, float]:
    """The mean squared error of one map [out, in + 1] for each kind, relative to its spread."""
    found = {}
    for kind, gram in grams.items():
        missing = weight - projections[kind]
        found[kind] = float(((missing @ gram) * missing).sum() / gram[-1, -1] / spreads[kind])
    return found


def average(projections: ByKind) -> torch.Tensor:
    """The mean of projections [out, in + 1]."""
    return torch.stack(list(projections.values())).mean(0)


def shared_moments(grams: ByKind, projections: ByKind, spreads: Mapping[str, float]) -> Moments:
    """The sums of which one map for all kinds is fitted, each kind with the same weight."""
    parts = []
    for kind, gram in grams.items():
        scaled = gram / gram[-1, -1] / spreads[kind]
        cross = projections[kind] @ scaled
        parts.append((scaled, cross, (cross * projections[kind]).sum(1)))
    gram, cross, squares = (sum(column[1:], column[0]) for column in zip(*parts, strict=True))
    return Moments(gram, cross, squares)


def fit_shared(train: ByKind, deciding: ByKind, projections: ByKind) -> Fit:
    """The one map [out, in + 1] for all kinds, whose ridge strength features choose that it is not fitted to.

    Args:
        train: Gram matrices of the features to fit to, of all kinds.
        deciding: those of the features that decide, perhaps of fewer kinds.
        projections: A_m [out, in + 1] in fp64, with the bias as the last column.
    """
    spreads = {kind: spread(gram, projections[kind]) for kind, gram in train.items()}
    fitted, held_out = (shared_moments(grams, projections, spreads) for grams in (train, deciding))
    return fit(fitted, held_out, average(projections), strengths=(SMALLEST_STRENGTH, *STRENGTHS))[0]
