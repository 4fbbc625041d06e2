"""The losses that `compare` allows a new model, from its options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoglm_compress.errors import UserError

DEFAULT_MAX_DROP = 1.0


@dataclass(frozen=True)
class Limits:
    """The allowed losses (None: not gated), and the confidence.

    `max_drop` is in points of accuracy on MMLU, 1 if it is None and both files have MMLU. `max_perplexity_increase` is
    in percent of the base's. `max_divergence`, in nats, and `min_agreement`, in percent of the tokens, are of what
    `evaluate --against` measured of the new model, whatever the base's are. `max_loss` has by `task:metric` how much
    worse a metric of another task of lm-eval may be than the base's, in the metric's own unit.

    Raises:
        UserError: a number is out of range.
    """

    max_drop: float | None = None
    max_perplexity_increase: float | None = None
    max_divergence: float | None = None
    min_agreement: float | None = None
    max_loss: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for option, given, highest, expected in (
            ("--max-drop", self.max_drop, 100, "points from 0 to 100"),
            ("--max-perplexity-increase", self.max_perplexity_increase, None, "percent from 0"),
            ("--max-divergence", self.max_divergence, None, "nats from 0"),
            ("--min-agreement", self.min_agreement, 100, "percent from 0 to 100"),
            *((f"--max-loss {name}", amount, None, "a number from 0") for name, amount in self.max_loss.items()),
        ):
            if given is None:
                continue
            if not (0 <= given < math.inf and (highest is None or given <= highest)):
                raise UserError(f"{option}: given {given:g}: expected {expected}.")
        if not 0.5 < self.confidence < 1:
            raise UserError(
                f"--confidence: given {self.confidence:g}: expected a number between 0.5 and 1, such as 0.95."
            )

    @property
    def nothing_but_mmlu(self) -> bool:
        """Whether only accuracy on MMLU is gated."""
        others = self.max_perplexity_increase, self.max_divergence, self.min_agreement
        return others == (None, None, None) and not self.max_loss


def parse_losses(given: Sequence[str]) -> dict[str, float]:
    """Amounts by `task:metric`, as `--max-loss` takes them.

    Raises:
        UserError: one is not of the form TASK:METRIC=AMOUNT, or names a metric a second time.
    """
    found: dict[str, float] = {}
    for text in given:
        name, _, amount = text.rpartition("=")
        task, _, metric = name.partition(":")
        try:
            value = float(amount)
        except ValueError:
            value = None
        if not task or not metric or value is None:
            raise UserError(f"--max-loss: given {text!r}: expected TASK:METRIC=AMOUNT, such as arc_easy:acc=0.01.")
        if name in found:
            raise UserError(f"--max-loss: {name} is given twice.")
        found[name] = value
    return found
