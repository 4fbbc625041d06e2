"""Rows of calibration tokens to fit to, with rows among them that decide about the fits instead."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.calibration.tokens import batched

DECIDING_EVERY = 8
"""One row in so many decides about a fit instead of being fitted to, and one at least."""


@dataclass(frozen=True)
class DividedRows:
    """Batches of token ids [rows, length], and which of the rows of each decide, [rows] of bool."""

    batches: list[torch.Tensor]
    deciding: list[torch.Tensor]


def deciding_rows(samples: int) -> int:
    """How many of so many samples decide."""
    return max(1, samples // DECIDING_EVERY)


def divided(fitted: torch.Tensor, deciding: torch.Tensor) -> DividedRows:
    """Rows [n, length] to fit to and rows [m, length] that decide, these spread evenly among those."""
    total, length = len(fitted) + len(deciding), fitted.shape[1]
    decides = torch.zeros(total, dtype=torch.bool)
    decides[torch.arange(1, len(deciding) + 1) * total // max(len(deciding), 1) - 1] = True
    rows = fitted.new_empty(total, length)
    rows[decides], rows[~decides] = deciding, fitted
    return of_batches(batched(rows), decides)


def of_batches(batches: Sequence[torch.Tensor], decides: torch.Tensor) -> DividedRows:
    """Batches of token ids [rows, length] of whose rows, counted through, those decide that `decides` [rows] names."""
    return DividedRows(list(batches), list(decides.split([len(batch) for batch in batches])))


def undivided(batches: Sequence[torch.Tensor]) -> DividedRows:
    """Batches of token ids [rows, length] of which some rows decide, for want of rows of documents kept for that."""
    total = sum(map(len, batches))
    decides = torch.arange(total) % DECIDING_EVERY == DECIDING_EVERY - 1
    decides[-1] |= not decides.any()
    return of_batches(batches, decides)
