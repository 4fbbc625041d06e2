"""Rows of tokens as batches. Rows with a common beginning share it; other rows are padded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.forward.one_layer_model import Fork

Row = tuple[int, ...]

WORTH_SHARING = 0.5
"""The share of a row that must equal other rows' beginning for the row to become a branch of the same sequence."""


@dataclass(frozen=True)
class Batch:
    """Rows side by side, or, if the first `shared` tokens of all are the same, in one sequence that forks after them.

    In the first case padding is on the right, where causal attention keeps it from every real token.
    """

    rows: tuple[Row, ...]
    shared: int = 0

    @property
    def size(self) -> int:
        """Tokens to send through the model, padding included."""
        if self.shared:
            return self.shared + sum(len(row) - self.shared for row in self.rows)
        return len(self.rows) * max(map(len, self.rows))

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids [sequences, length]."""
        if self.shared:
            rests = [token for row in self.rows for token in row[self.shared :]]
            return torch.tensor([[*self.rows[0][: self.shared], *rests]])
        padded = torch.zeros(len(self.rows), max(map(len, self.rows)), dtype=torch.long)
        for line, row in enumerate(self.rows):
            padded[line, : len(row)] = torch.tensor(row)
        return padded

    @property
    def fork(self) -> Fork | None:
        """How the one sequence forks."""
        return Fork(self.shared, tuple(len(row) - self.shared for row in self.rows)) if self.shared else None

    def spot(self, line: int, place: int) -> tuple[int, int]:
        """The index in `tokens` of a row's position."""
        if not self.shared:
            return line, place
        if place < self.shared:
            return 0, place
        return 0, place + sum(len(row) - self.shared for row in self.rows[:line])


def in_batches(rows: Iterable[Row], budget: int, window: int | None) -> Iterator[Batch]:
    """Batches of at most `budget` tokens. A batch of a single row, or up to twice the rows' common beginning, may be
    larger.

    Args:
        rows: in any order.
        budget: tokens of a batch, padding included.
        window: the most tokens that a row with branches may have, since no sliding window reaches into them.
    """
    alone: list[Row] = []
    for group in _alike(sorted(rows), budget):
        longest = max(map(len, group.rows))
        if len(group.rows) > 1 and (window is None or longest <= window):
            yield group
        else:
            alone += group.rows
    batch: list[Row] = []
    for row in sorted(alone, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > budget:
            yield Batch(tuple(batch))
            batch = []
        batch.append(row)
    if batch:
        yield Batch(tuple(batch))


def _alike(rows: Sequence[Row], budget: int) -> Iterator[Batch]:
    """Sorted rows, those together that have enough in common."""
    group: Batch | None = None
    for row in rows:
        if group is not None:
            shared = _common(group.rows[0][: group.shared], row)
            joined = Batch((*group.rows, row), shared)
            enough = all(shared >= WORTH_SHARING * len(member) for member in joined.rows)
            if enough and joined.size <= max(budget, 2 * shared):
                group = joined
                continue
            yield group
        group = Batch((row,), len(row))
    if group is not None:
        yield group


def _common(one: Row, other: Row) -> int:
    """How many tokens two rows have in common from the start."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
