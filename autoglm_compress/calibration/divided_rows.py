"""Rows of calibration tokens. Most are fitted to; the others decide about the fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.calibration.tokens import batched

DECIDING_EVERY = 8
"""One row in this many decides about a fit instead of being fitted to; at least one row does."""


@dataclass(frozen=True)
class DividedRows:
    """Batches of token ids [rows, length], and which of the rows of each decide, [rows] of bool."""

    batches: list[torch.Tensor]
    deciding: list[torch.Tensor]


def deciding_rows(samples: int) -> int:
    """The number of deciding rows among so many samples."""
    return max(1, samples // DECIDING_EVERY)


def divided(fitted: torch.Tensor, deciding: torch.Tensor) -> DividedRows:
    """Rows [n, length] to fit to, and rows [m, length] that decide, spread evenly among them."""
    total, length = len(fitted) + len(deciding), fitted.shape[1]
    decides = torch.zeros(total, dtype=torch.bool)
    decides[torch.arange(1, len(deciding) + 1) * total // max(len(deciding), 1) - 1] = True
    rows = fitted.new_empty(total, length)
    rows[decides], rows[~decides] = deciding, fitted
    return of_batches(batched(rows), decides)


def of_batches(batches: Sequence[torch.Tensor], decides: torch.Tensor) -> DividedRows:
    """Batches of token ids [rows, length]; `decides` [rows of all batches] marks the rows that decide."""
    return DividedRows(list(batches), list(decides.split([len(batch) for batch in batches])))


def undivided(batches: Sequence[torch.Tensor]) -> DividedRows:
    """Batches of token ids [rows, length] in which some calibration rows decide, because no documents are set apart."""
    total = sum(map(len, batches))
    decides = torch.arange(total) % DECIDING_EVERY == DECIDING_EVERY - 1
    decides[-1] |= not decides.any()
    return of_batches(batches, decides)
