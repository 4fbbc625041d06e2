"""From documents to rows of tokens."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.text import PYTHON_DOCS, Document, documents
from autoglm_compress.errors import UserError

BATCH_TOKENS = 4096
"""Tokens sent through a layer at once: enough for efficient products, few enough for their activations to be small."""


class CalibrationOptions(BaseModel):
    """The text that activations are measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = PYTHON_DOCS
    samples: int = Field(default=128, gt=0)
    sequence_length: int = Field(default=2048, gt=1)
    seed: int = Field(default=0, ge=0)


def token_rows(
    tokenizer: Any, path: Path | None, split: Split, samples: int, sequence_length: int, seed: int
) -> torch.Tensor:
    """Token ids [samples, sequence_length] from one split of a source, in an order that the seed decides.

    Documents stand one after the other, separated by the end-of-text token, and are cut into rows without padding.
    A source with too little text gives fewer rows.

    Raises:
        UserError: the source does not fill a single row.
    """
    order = documents(path, split)
    random.Random(seed).shuffle(order)
    needed = samples * sequence_length
    stream: list[int] = []
    for ids in _encode(tokenizer, order):
        stream += ids
        if len(stream) >= needed:
            break
    rows = min(samples, len(stream) // sequence_length)
    if rows == 0:
        raise UserError(
            f"{path or PYTHON_DOCS}: the {split} split has {len(stream)} tokens, not enough for one row of "
            f"sequence_length {sequence_length}. Give more text or a smaller sequence_length."
        )
    return torch.tensor(stream[: rows * sequence_length]).view(rows, sequence_length)


def _encode(tokenizer: Any, order: Iterable[Document]) -> Iterable[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in order:
        if isinstance(document, str):
            text = document
        elif tokenizer.chat_template:
            # Some templates print the date: it must not change the tokens from one day to the next.
            text = tokenizer.apply_chat_template(document, tokenize=False, date_string="1 Jan 2025")
        else:
            text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in document)
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end


def batched(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [samples, sequence_length] as batches of at most BATCH_TOKENS tokens, and of one row at least."""
    return list(rows.split(max(1, BATCH_TOKENS // rows.shape[1])))
