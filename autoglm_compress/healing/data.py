"""The rows that are trained on, their order, and the rows held out to judge by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoglm_compress.calibration.tokens import interleaved

HELD_OUT_EVERY = 16
HELD_OUT_TOKENS = 2**14


def rows_to_fetch(wanted: int, length: int) -> int:
    """How many rows of a source leave so many to train on when some are held out."""
    return wanted + 1 + min(wanted // (HELD_OUT_EVERY - 1), HELD_OUT_TOKENS // length)


@dataclass(frozen=True)
class TextPart:
    """Rows [rows, length] of one text source, and how many rows of it are wanted; of a small source, some again."""

    rows: torch.Tensor
    wanted: int


@dataclass(frozen=True)
class TrainingRows:
    """Token ids [rows, length], the numbers of those to train on in order, and of those held out."""

    rows: torch.Tensor
    order: torch.Tensor
    held_out: torch.Tensor

    @property
    def passes(self) -> float:
        """How often a row that is trained on is seen."""
        return len(self.order) / max(len(self.rows) - len(self.held_out), 1)


def training_rows(parts: Sequence[TextPart], seed: int) -> TrainingRows:
    """Hold out some rows of every source, and shuffle the others anew for each pass; sources keep their shares."""
    generator = torch.Generator().manual_seed(seed)
    orders, held_out, start = [], [], 0
    for part in parts:
        numbers = torch.arange(start, start + len(part.rows))
        start += len(part.rows)
        most = max(1, HELD_OUT_TOKENS // part.rows.shape[1] // len(parts))
        judging = numbers[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY][:most] if len(numbers) > 1 else numbers
        judging = judging if len(judging) else numbers[-1:]
        training = numbers[~torch.isin(numbers, judging)] if len(numbers) > 1 else numbers
        passes = -(-part.wanted // len(training))
        order = [training[torch.randperm(len(training), generator=generator)] for _ in range(passes)]
        orders.append(torch.cat(order)[: part.wanted])
        held_out.append(judging)
    return TrainingRows(torch.cat([part.rows for part in parts]), interleaved(orders), torch.cat(held_out))
