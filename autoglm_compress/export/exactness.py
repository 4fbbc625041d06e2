"""How exactly a file holds what a checkpoint does: what had to be rounded, and how far that is."""

from dataclasses import dataclass, field
from typing import Any

from autoglm_compress.errors import UserError

MOST_ERROR = 2e-3
"""The root of a tensor's mean squared error relative to its mean square, past which it is not the same tensor.

Rounding fp32 scales to fp16 makes 2e-4 of it, rounding weights to 4 bits 1e-1.
"""


@dataclass(frozen=True)
class Rounding:
    """What storing one tensor rounded: `changed` of so many `stored` numbers, with a relative error of the weights."""

    stored: int
    changed: int
    error: float


@dataclass
class Exactness:
    """The roundings of a file's tensors, by kind: `scales`, `minima` and `values`."""

    stored: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    largest_error: float = 0.0
    worst: str | None = None

    def add(self, tensor: str, kind: str, rounding: Rounding) -> None:
        """Count one tensor's.

        Raises:
            UserError: the tensor would be another one.
        """
        if not rounding.error <= MOST_ERROR:
            raise UserError(
                f"{tensor}: fp16 cannot hold its {kind}: {rounding.changed} of {rounding.stored} change, and the "
                f"weights by {100 * rounding.error:.2g} % (at most {100 * MOST_ERROR:g} % is allowed). Export a "
                "checkpoint with weights of usual size, or in float32."
            )
        self.stored[kind] = self.stored.get(kind, 0) + rounding.stored
        self.changed[kind] = self.changed.get(kind, 0) + rounding.changed
        if rounding.error > self.largest_error:
            self.largest_error, self.worst = rounding.error, tensor

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        kinds = {kind: {"stored": self.stored[kind], "rounded": self.changed[kind]} for kind in sorted(self.stored)}
        return kinds | {"largest_relative_error": float(f"{self.largest_error:.3g}"), "in": self.worst}

    def in_words(self) -> str:
        """One line for people."""
        parts = [f"{self.changed[kind]} of {self.stored[kind]} {kind}" for kind in sorted(self.stored)]
        if not any(self.changed.values()):
            return f"{', '.join(sorted(self.stored)) or 'integers'}: all exactly the checkpoint's"
        return f"rounded to fp16: {', '.join(parts)}; relative error of a tensor at most {self.largest_error:.1g}"


def relative_error(difference: float, size: float) -> float:
    """The root of squared differences relative to the squares of what is exact; infinite where that is no number."""
    error = (difference / size) ** 0.5 if size else 0.0
    return error if error == error else float("inf")
