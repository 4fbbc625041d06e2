"""The rule by which a new model passes, fails, or is undecided.

A model fails if it is proven worse than allowed: the lower bound of its drop is above the limit. It passes if it is
proven not worse than allowed: the upper bound is at or below the limit. Each bound holds with the confidence asked for,
so at 95 % a model whose true drop is at the limit fails at most about once in 20 times, one that did not change far
less often, and one that lost more than allowed passes at most about once in 20 times. Every other model is undecided,
and more questions would decide it.

The bounds of accuracy are asymptotic. They are good, but with a limit of 0 and three changed answers they alone would
fail an unchanged model once in eight times. A model therefore fails only if McNemar's exact one-sided test rejects it
as well, which limits this error to once in 20 times for all counts. `python benchmarks/compare_power.py` simulates all
of it.
"""

import math
from collections.abc import Sequence
from enum import Enum

from scipy.stats import norm, t

from autoglm_compress.comparison.paired import drop_score, mcnemar_drop, mean_score

GROWTH = 1.02
"""Step of the search for the number of questions that decides, where the exact test needs more of them."""

MOST = 10**9
"""The most questions or rows. A verdict that needs more of them counts as out of reach."""


class Verdict(str, Enum):
    """The verdict of a gate."""

    passed = "pass"
    failed = "fail"
    undecided = "undecided"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Fail if anything fails, else undecided if anything is."""
    for verdict in (Verdict.failed, Verdict.undecided):
        if verdict in verdicts:
            return verdict
    return Verdict.passed


def judge_drop(lost: int, won: int, questions: int, max_drop: float, confidence: float) -> Verdict:
    """Whether accuracy dropped by more than `max_drop`, a part of the questions from 0 to 1."""
    quantile = float(norm.ppf(confidence))
    score = drop_score(lost, won, questions, max_drop)
    if score > quantile and mcnemar_drop(lost, won) <= 1 - confidence:
        return Verdict.failed
    return Verdict.passed if score <= -quantile else Verdict.undecided


def questions_to_decide(lost: int, won: int, questions: int, max_drop: float, confidence: float) -> int | None:
    """How many questions would decide an undecided comparison, if further answers differ at the same rate.

    None if even MOST questions would not: the observed drop is at the limit, or very close to it.
    """
    quantile = float(norm.ppf(confidence))
    score = drop_score(lost, won, questions, max_drop)
    if abs(score) * math.sqrt(MOST / questions) < quantile:
        return None
    # The score is proportional to the root of the number of questions.
    needed = max(questions + 1, math.ceil(questions * (quantile / score) ** 2))
    while score > 0 and mcnemar_drop(round(lost * needed / questions), round(won * needed / questions)) > (
        1 - confidence
    ):
        needed = math.ceil(needed * GROWTH)
    return needed


def judge_increase(differences: Sequence[float], limit: float, confidence: float) -> Verdict:
    """Whether the true mean of the differences of rows is above a limit."""
    quantile = float(t.ppf(confidence, len(differences) - 1))
    score = mean_score(differences, limit)
    if score > quantile:
        return Verdict.failed
    return Verdict.passed if score <= -quantile or not any(differences) else Verdict.undecided


def judge_value(value: float, limit: float) -> Verdict:
    """Whether a single number is above a limit. It decides alone where no spread is known. NaN fails."""
    return Verdict.passed if value <= limit else Verdict.failed


def rows_to_decide(differences: Sequence[float], limit: float, confidence: float) -> int | None:
    """How many rows would decide an undecided comparison, at the same spread. None if more than MOST."""
    seen = len(differences)
    score = abs(mean_score(differences, limit))
    if score * math.sqrt(MOST / seen) < float(norm.ppf(confidence)):
        return None
    rows = seen + 1
    while score * math.sqrt((rows - 1) / (seen - 1)) < float(t.ppf(confidence, rows - 1)):
        rows = math.ceil(rows * GROWTH)
    return rows
