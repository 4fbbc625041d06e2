"""Text streamed by the `datasets` library, as rows of tokens."""

from collections.abc import Iterator
from itertools import tee
from typing import Any

import torch

from autoglm_compress.calibration.dataset import Dataset, streamed
from autoglm_compress.calibration.python_docs import PARTS, Split, split_of_text
from autoglm_compress.calibration.tokens import packed_rows
from autoglm_compress.calibration.training_rows import TextPart, deciding_rows, rows_to_fetch, set_apart
from autoglm_compress.errors import UserError


def dataset_rows(options: Dataset, tokenizer: Any, wanted: int, length: int) -> TextPart:
    """The first rows [rows, length] of a dataset, up to the number wanted, and rows that decide.

    Documents are split like those of calibration sources, so a text in both gets the same role in both. Only the needed
    part is fetched. If the dataset is too small for the split, some of its rows decide.

    Raises:
        UserError: the dataset, its split or its column is not there, or it does not fill a row.
    """
    most = deciding_rows(wanted, length, 1)
    # One stream for both: documents that one of them skips are kept for the other.
    fitted, deciding, all_but_held_out = tee(streamed(options, "data"), 3)
    rows = packed_rows(tokenizer, _of("fitted", fitted), wanted, length).to(torch.int32)
    decide = packed_rows(tokenizer, _of("deciding", deciding), most, length).to(torch.int32)
    if len(rows) and len(decide):
        return TextPart(rows, wanted, decide)
    rows = packed_rows(tokenizer, _of("calibration", all_but_held_out), rows_to_fetch(wanted, length), length)
    if len(rows) == 0:
        raise UserError(
            f"data: {options.dataset}: not enough text for one row of sequence_length {length}: give more, or smaller "
            "rows. A tenth of the documents is left out, as held out to measure on."
        )
    return set_apart(rows.to(torch.int32), wanted, most)


def _of(split: Split, texts: Iterator[str]) -> Iterator[str]:
    return (text for text in texts if split_of_text(text) in PARTS[split])
