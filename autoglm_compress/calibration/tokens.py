"""From documents to rows of tokens."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationInfo, field_validator

from autoglm_compress.calibration.chat import chat_text
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.text import PYTHON_DOCS, Document, shuffled
from autoglm_compress.errors import UserError

BATCH_TOKENS = 4096
"""Tokens sent through a layer at once: enough for efficient products, few enough for their activations to be small."""

Share = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
RowOptions = TypeVar("RowOptions", bound=BaseModel)
"""Options with a `sequence_length`."""
_SHARES = TypeAdapter(Annotated[dict[str, Share], Field(min_length=1)])


def _source(value: Any) -> str | dict[str, float]:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError("expected a text source, or a mapping of text sources to shares, such as {python-docs: 3}")
    return _SHARES.validate_python(value)


class CalibrationOptions(BaseModel):
    """The text that activations are measured on: one source, or several with the share of the samples of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str | dict[str, float], PlainValidator(_source)] = PYTHON_DOCS
    samples: int = Field(default=128, gt=0, validate_default=True)
    sequence_length: int = Field(default=2048, gt=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("samples")
    @classmethod
    def _enough_for_every_source(cls, samples: int, info: ValidationInfo) -> int:
        source = info.data.get("source")
        if isinstance(source, dict) and len(source) > samples:
            raise ValueError(f"expected a sample or more for each of the {len(source)} sources")
        return samples

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.sequence_length

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at most."""
        return min(self.tokens, max(BATCH_TOKENS // self.sequence_length, 1) * self.sequence_length)

    @property
    def rows(self) -> dict[str, int]:
        """How many of the samples each source gives, by source."""
        return {self.source: self.samples} if isinstance(self.source, str) else share_out(self.source, self.samples)


def fitted_rows(options: RowOptions, longest: int | None) -> RowOptions:
    """Options with rows no longer than `longest` tokens where they do not say how long rows are to be.

    None stands for a model that reads rows of any length.
    """
    if longest is None or "sequence_length" in options.model_fields_set or options.sequence_length <= longest:
        return options
    return options.model_copy(update={"sequence_length": longest})


def share_out(shares: Mapping[str, float], rows: int) -> dict[str, int]:
    """Rows in proportion to positive shares, by largest remainder, but one at least of each; `rows` in all.

    There must be no more shares than rows.
    """
    total = sum(map(Fraction, shares.values()))
    exact = {source: rows * Fraction(share) / total for source, share in shares.items()}
    given = {source: int(part) for source, part in exact.items()}
    by_remainder = sorted(exact, key=lambda source: given[source] - exact[source])
    for source in by_remainder[: rows - sum(given.values())]:
        given[source] += 1
    for source in given:
        if given[source] == 0:
            given[max(given, key=given.__getitem__)] -= 1
            given[source] = 1
    return given


def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [samples, sequence_length] of several sources as one, so that every stretch of it holds their shares.

    So does every second, third, … row: nothing that takes rows at regular distances gets those of one source alone.
    A single source keeps its order.
    """
    rows = torch.cat(list(parts))
    if len(parts) == 1:
        return rows
    # Multiples of an irrational number, taken modulo 1, spread evenly, and so do those of its multiples.
    places = torch.arange(len(rows), dtype=torch.float64) * 2**0.5 % 1
    return rows[places.argsort().argsort()]


def token_rows(
    tokenizer: Any, path: Path | None, split: Split, samples: int, sequence_length: int, seed: int
) -> torch.Tensor:
    """Token ids [samples, sequence_length] from one split of a source, in an order that the seed decides.

    Documents stand one after the other, separated by the end-of-text token, and are cut into rows without padding.
    A source with too little text gives fewer rows.

    Raises:
        UserError: the source does not fill a single row.
    """
    rows = packed_rows(tokenizer, shuffled(path, split, seed), samples, sequence_length)
    if len(rows) == 0:
        tokens = sum(map(len, _encode(tokenizer, shuffled(path, split, seed))))
        raise too_little(path, split, tokens, sequence_length)
    return rows


def too_little(path: Path | None, split: Split, tokens: int, sequence_length: int) -> UserError:
    """What is said of a split that does not fill a single row."""
    return UserError(
        f"{path or PYTHON_DOCS}: the {split} split has {tokens} tokens, not enough for one row of "
        f"sequence_length {sequence_length}. Give more text or a smaller sequence_length."
    )


def packed_rows(tokenizer: Any, documents: Iterable[Document], samples: int, sequence_length: int) -> torch.Tensor:
    """Token ids [rows, sequence_length] of documents one after the other: `samples` rows, fewer if the text ends."""
    needed = samples * sequence_length
    stream: list[int] = []
    for ids in _encode(tokenizer, documents):
        stream += ids
        if len(stream) >= needed:
            break
    rows = min(samples, len(stream) // sequence_length)
    return torch.tensor(stream[: rows * sequence_length], dtype=torch.long).view(rows, sequence_length)


def _encode(tokenizer: Any, documents: Iterable[Document]) -> Iterable[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        text = document if isinstance(document, str) else chat_text(tokenizer, document)
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end


def batched(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [samples, sequence_length] as batches of at most BATCH_TOKENS tokens, and of one row at least."""
    return list(rows.split(max(1, BATCH_TOKENS // rows.shape[1])))
