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
    """Rows [rows, length] of one text source, and how many rows of it are wanted; of a small source, some again.

    What is trained is not judged by rows of a source that is not `judged`.
    """

    rows: torch.Tensor
    wanted: int
    judged: bool = True


def random_rows(count: int, length: int, vocab_size: int, seed: int) -> TextPart:
    """Rows of tokens drawn evenly from the whole vocabulary, most of which no small text contains."""
    generator = torch.Generator().manual_seed(seed)
    return TextPart(torch.randint(vocab_size, (count, length), generator=generator, dtype=torch.int32), count, False)


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
    """Hold out some rows of judged sources, and shuffle the others anew for each pass; sources keep their shares."""
    generator = torch.Generator().manual_seed(seed)
    orders, held_out, start = [], [], 0
    judged = sum(part.judged for part in parts)
    for part in parts:
        numbers = torch.arange(start, start + len(part.rows))
        start += len(part.rows)
        judging, training = _split(numbers, max(1, HELD_OUT_TOKENS // part.rows.shape[1] // judged), part.judged)
        passes = -(-part.wanted // len(training))
        order = [training[torch.randperm(len(training), generator=generator)] for _ in range(passes)]
        orders.append(torch.cat(order)[: part.wanted])
        held_out.append(judging)
    return TrainingRows(torch.cat([part.rows for part in parts]), interleaved(orders), torch.cat(held_out))


def _split(numbers: torch.Tensor, most: int, judged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a source to judge by, and those to train on; a single row does both."""
    if not judged:
        return numbers[:0], numbers
    if len(numbers) == 1:
        return numbers, numbers
    judging = numbers[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY][:most]
    judging = judging if len(judging) else numbers[-1:]
    return judging, numbers[~torch.isin(numbers, judging)]
