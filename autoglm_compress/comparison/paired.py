"""Statistics of two models on the same questions, and on the same rows of text.

A question that the base answers right and the new model does not is *lost*, one the other way round is *won*; questions
that both answer alike only show that the difference is small.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import bisect
from scipy.stats import binomtest, norm, t


def mcnemar(lost: int, won: int) -> float:
    """The p-value of no difference at all, two-sided: McNemar's exact test."""
    return binomtest(lost, lost + won).pvalue if lost + won else 1.0


def mcnemar_drop(lost: int, won: int) -> float:
    """The p-value of no drop, one-sided: the exact test against new models that are worse."""
    return binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0


def drop_score(lost: float, won: float, questions: float, drop: float) -> float:
    """How far the observed drop in accuracy lies above an assumed true drop, in standard errors under that true drop.

    The score statistic of Tango, Statistics in Medicine 17 (1998) 891-908: the standard error is that of the
    likeliest model in which `drop` is true, so that it holds for few or no questions lost or won too. Proportional to
    the root of all counts.

    Args:
        lost: questions only the base answers right.
        won: questions only the new model answers right.
        questions: those both were asked.
        drop: between -1 and 1, as a part of the questions.
    """
    a = 2 * questions
    b = (2 * questions - lost + won) * drop - lost - won
    c = -won * drop * (1 - drop)
    won_share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = questions * max(2 * won_share + drop * (1 - drop), 0.0)
    distance = lost - won - questions * drop
    if variance == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def drop_bounds(lost: int, won: int, questions: int, confidence: float) -> tuple[float, float]:
    """Bounds of the true drop in accuracy as a part of the questions, each of which holds with `confidence`.

    The drops at which `drop_score` is the normal quantile of `confidence`, on either side.
    """
    quantile = float(norm.ppf(confidence))
    seen = (lost - won) / questions

    def bound(end: float, score: float) -> float:
        if seen == end:
            return end
        return bisect(lambda drop: drop_score(lost, won, questions, drop) - score, *sorted((seen, end)), xtol=1e-9)

    return bound(-1.0, quantile), bound(1.0, -quantile)


def mean_bounds(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Bounds of the true mean of differences, each of which holds with `confidence`, by Student's t.

    Args:
        differences: two or more, one for each row.
        confidence: between 0.5 and 1.
    """
    mean, spread = float(np.mean(differences)), _spread(differences)
    reach = float(t.ppf(confidence, len(differences) - 1)) * spread
    return mean - reach, mean + reach


def mean_score(differences: Sequence[float], mean: float) -> float:
    """How far the mean of differences lies above a true mean, in standard errors."""
    distance, spread = float(np.mean(differences)) - mean, _spread(differences)
    if spread == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / spread


def _spread(differences: Sequence[float]) -> float:
    """The standard error of the mean."""
    return float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
