"""Rows to train on, their order, and the rows that decide which weights are kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.calibration.tokens import interleaved

DECIDING_EVERY = 16
DECIDING_TOKENS = 2**14


def deciding_rows(wanted: int, length: int, sources: int) -> int:
    """The most deciding rows, of so many tokens each, beside the rows to train on, for one of so many sources."""
    return max(1, min(wanted // (DECIDING_EVERY - 1), DECIDING_TOKENS // length // sources))


def rows_to_fetch(wanted: int, length: int) -> int:
    """The number of rows to fetch so that this many are left to train on after `set_apart`."""
    return wanted + 1 + min(wanted // (DECIDING_EVERY - 1), DECIDING_TOKENS // length)


@dataclass(frozen=True)
class TextPart:
    """Rows [rows, length] of one text source, and the number of rows wanted. Rows of a small source repeat.

    `deciding` are rows [number, length] that judge the training. A source without any is not judged.
    """

    rows: torch.Tensor
    wanted: int
    deciding: torch.Tensor


def random_rows(count: int, length: int, vocab_size: int, seed: int) -> TextPart:
    """Rows of tokens drawn uniformly from the vocabulary. Small texts contain only a small part of it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(vocab_size, (count, length), generator=generator, dtype=torch.int32)
    return TextPart(rows, count, rows[:0])


def set_apart(rows: torch.Tensor, wanted: int, most: int) -> TextPart:
    """Rows [rows, length] to train on, and at most `most` of them to decide instead. A single row does both."""
    if len(rows) == 1:
        return TextPart(rows, wanted, rows)
    decides = torch.zeros(len(rows), dtype=torch.bool)
    decides[torch.arange(len(rows))[DECIDING_EVERY // 2 :: DECIDING_EVERY][:most]] = True
    decides[-1] |= not decides.any()
    return TextPart(rows[~decides], wanted, rows[decides])


@dataclass(frozen=True)
class TrainingRows:
    """Token ids [rows, length], the numbers of the rows to train on in order, and of the rows that decide."""

    rows: torch.Tensor
    order: torch.Tensor
    held_out: torch.Tensor

    @property
    def passes(self) -> float:
        """The average number of times that a row is trained on."""
        return len(self.order) / max(len(self.rows) - len(self.held_out), 1)


def training_rows(parts: Sequence[TextPart], seed: int) -> TrainingRows:
    """Shuffle the training rows for each pass; sources keep their shares. Deciding rows come last."""
    generator = torch.Generator().manual_seed(seed)
    orders, start = [], 0
    for part in parts:
        training = torch.arange(start, start + len(part.rows))
        start += len(part.rows)
        passes = -(-part.wanted // len(training))
        order = [training[torch.randperm(len(training), generator=generator)] for _ in range(passes)]
        orders.append(torch.cat(order)[: part.wanted])
    rows = torch.cat([*(part.rows for part in parts), *(part.deciding for part in parts)])
    return TrainingRows(rows, interleaved(orders), torch.arange(start, len(rows)))
