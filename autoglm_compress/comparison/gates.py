"""Verdicts on two models' results for the same questions or rows, and how many more would decide."""

from collections.abc import Sequence

from autoglm_compress.comparison.measure import Gate
from autoglm_compress.comparison.verdict import (
    Verdict,
    judge_drop,
    judge_increase,
    questions_to_decide,
    rows_to_decide,
)


def gate_on_answers(
    lost: int, won: int, questions: int, max_drop: float, confidence: float, *, same: bool, shown: float
) -> Gate:
    """The verdict on right answers. `max_drop` is the share that may be lost; `shown` is the limit as the user gave it.

    A model that gives the very same log-likelihoods passes, however few the questions are.
    """
    asked = lost, won, questions, max_drop, confidence
    verdict = Verdict.passed if same else judge_drop(*asked)
    return Gate(shown, verdict, questions_to_decide(*asked) if verdict is Verdict.undecided else None)


def gate_on_rows(rows: Sequence[float], limit: float, confidence: float, shown: float) -> Gate:
    """The verdict on the mean of rows, where less is better. `shown` is the limit as the user gave it."""
    verdict = judge_increase(rows, limit, confidence)
    needed = rows_to_decide(rows, limit, confidence) if verdict is Verdict.undecided else None
    return Gate(shown, verdict, needed)
