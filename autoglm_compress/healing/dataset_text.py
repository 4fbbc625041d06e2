"""Text streamed by the `datasets` library, as rows of tokens."""

from collections.abc import Iterator
from typing import Any

import torch

from autoglm_compress.calibration.tokens import packed_rows
from autoglm_compress.errors import UserError
from autoglm_compress.healing.options import Dataset


def dataset_rows(options: Dataset, tokenizer: Any, rows: int, length: int) -> torch.Tensor:
    """The first rows [rows, length] of a dataset, as many as are wanted or as it has; nothing more is fetched.

    Raises:
        UserError: the dataset, its split or its column is not there, or it does not fill a row.
    """
    found = packed_rows(tokenizer, _texts(options), rows, length)
    if len(found) == 0:
        raise UserError(f"data: {options.dataset}: not enough text for one row of sequence_length {length}.")
    return found.to(torch.int32)


def _texts(options: Dataset) -> Iterator[str]:
    from datasets import load_dataset

    try:
        for number, row in enumerate(
            load_dataset(options.dataset, options.subset, split=options.split, streaming=True)
        ):
            text = row.get(options.column)
            if number == 0 and not isinstance(text, str):
                there = ", ".join(row)
                raise UserError(f"data: {options.dataset}: no text column {options.column!r}; there are {there}.")
            if isinstance(text, str):
                yield text
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds; the user needs one sentence
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"data: {options.dataset}: cannot be streamed: {reason}") from None
