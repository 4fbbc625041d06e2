"""What `compare` says of one measure of two models."""

from dataclasses import dataclass
from enum import Enum

from autoglm_compress.comparison.verdict import Verdict


class Unit(str, Enum):
    """The unit of values, which decides how they are printed."""

    percent_right = "percent right"
    perplexity = "perplexity"
    nats = "nats"
    percent_of_tokens = "percent of tokens"
    own = "own"


@dataclass(frozen=True)
class Gate:
    """A verdict on a measure, and how many questions or rows would decide it if it is undecided (None: none would)."""

    limit: float
    verdict: Verdict
    needed: int | None = None


@dataclass(frozen=True)
class Measure:
    """One measure of both models. `base` and `change` are None if only the new model was measured.

    `change` is from base to new: in points of accuracy or of agreement, percent of perplexity, nats, or a metric's own
    unit. `low` and `high` are bounds of what is gated, the true change, or the true value of `new` where `absolute`;
    each holds with the confidence asked for, and both are None where single values are not on record. `level` is
    `total`, `category` or `subject`; `count` is the number of questions, rows or documents (None: not on record).
    """

    name: str
    level: str
    unit: Unit
    count: int | None
    base: float | None
    new: float
    change: float | None
    low: float | None
    high: float | None
    higher_is_better: bool | None
    absolute: bool = False
    gate: Gate | None = None


@dataclass(frozen=True)
class Accuracy(Measure):
    """Right answers to the same questions: how many only the base has, how many only the new model, the p-value of
    McNemar's exact test, two-sided, and whether not one log-likelihood is another.
    """

    lost: int = 0
    won: int = 0
    p_value: float = 1.0
    same: bool = False
