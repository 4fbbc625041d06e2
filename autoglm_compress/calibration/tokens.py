"""From documents to rows of tokens."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, WrapValidator, field_validator

from autoglm_compress.calibration.chat import Chat
from autoglm_compress.calibration.dataset import DatasetSource
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import PYTHON_DOCS, Document, shuffled
from autoglm_compress.errors import UserError

BATCH_TOKENS = 4096
"""Tokens sent through a layer at once: enough for efficient products, few enough for their activations to be small."""

Share = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _OfRows(Protocol):
    """Options with a `sequence_length`, which is what is needed here of a pydantic model."""

    @property
    def sequence_length(self) -> int: ...

    @property
    def model_fields_set(self) -> set[str]: ...

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Any: ...


RowOptions = TypeVar("RowOptions", bound=_OfRows)
_SHARES = TypeAdapter(Annotated[dict[str, Share], Field(min_length=1)])


def _source(value: Any, _: Any) -> str | dict[str, float] | DatasetSource:
    if isinstance(value, str | DatasetSource):
        return value
    if not isinstance(value, dict):
        raise ValueError("expected a text source, or a mapping of text sources to shares, such as {python-docs: 3}")
    if "dataset" in value:  # no text source has this name
        return DatasetSource.model_validate(value)
    return _SHARES.validate_python(value)


class CalibrationOptions(BaseModel):
    """The text that activations are measured on: one source, several with their shares of the samples, or a dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str | dict[str, float] | DatasetSource, WrapValidator(_source)] = PYTHON_DOCS
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
        return share_out(self.shares, self.samples)

    def title(self, path: Path | None) -> str:
        """What messages call the text of a source: its file, or the dataset that the file was made from."""
        if isinstance(self.source, DatasetSource):
            return f"calibration.source: {self.source.dataset}"
        return file_title(path)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source; a dataset is known by its name."""
        if isinstance(self.source, DatasetSource):
            return {self.source.dataset: 1.0}
        return {self.source: 1.0} if isinstance(self.source, str) else self.source


def fitted_rows(options: RowOptions, longest: int | None) -> RowOptions:
    """Options with rows of at most `longest` tokens, if they do not set a length themselves.

    `longest` is None for a model without a limit.
    """
    if longest is None or "sequence_length" in options.model_fields_set or options.sequence_length <= longest:
        return options
    return options.model_copy(update={"sequence_length": longest})


def share_out(shares: Mapping[str, float], rows: int) -> dict[str, int]:
    """Row counts in proportion to positive shares, by largest remainder; at least one each, `rows` in total.

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
    """Rows [samples, sequence_length] of several sources, interleaved so that every stretch holds them in their shares.

    Taking every second, third, … row also gives all sources in their shares. A single source keeps its order.
    """
    rows = torch.cat(list(parts))
    if len(parts) == 1:
        return rows
    # Multiples of an irrational number, taken modulo 1, spread evenly, and so do those of its multiples.
    places = torch.arange(len(rows), dtype=torch.float64) * 2**0.5 % 1
    return rows[places.argsort().argsort()]


def token_rows(
    reader: Reader,
    path: Path | None,
    split: Split,
    samples: int,
    sequence_length: int,
    seed: int,
    title: str | None = None,
) -> torch.Tensor:
    """Token ids [samples, sequence_length] from one split of a source, in an order that the seed decides.

    Documents stand one after the other, separated by the end-of-text token, and are cut into rows without padding.
    A source with too little text gives fewer rows. Messages call it by its title, or by its file if it has none.

    Raises:
        UserError: the source does not fill a single row.
    """
    rows = packed_rows(reader, shuffled(path, split, seed), samples, sequence_length)
    if len(rows) == 0:
        tokens = sum(len(reader.ids(document)) for document in shuffled(path, split, seed))
        raise too_little(title or file_title(path), split, tokens, sequence_length)
    return rows


def file_title(path: Path | None) -> str:
    """What messages call the text of a file, or the built-in text."""
    return PYTHON_DOCS if path is None else str(path)


def too_little(title: str, split: Split, tokens: int, sequence_length: int) -> UserError:
    """The message about a split that does not fill a single row."""
    return UserError(
        f"{title}: the {split} split has {tokens} tokens, not enough for one row of "
        f"sequence_length {sequence_length}. Give more text or a smaller sequence_length."
    )


def packed_rows(reader: Reader, documents: Iterable[Document], samples: int, sequence_length: int) -> torch.Tensor:
    """Token ids [rows, sequence_length] of concatenated documents: `samples` rows, or fewer if the text ends.

    No row begins within a chat with images or sounds: what is left of one at the end of a row is dropped.

    Raises:
        UserError: such a chat is longer than a row.
    """
    packed = PackedRows(samples, sequence_length)
    for document in documents:
        ids = reader.ids(document)
        if isinstance(document, Chat) and document.media:
            _require_length(document, len(ids), sequence_length)
            packed.add(ids, in_one_row=True)
        else:
            packed.add(ids)
        if packed.full:
            break
    return packed.rows().long()


def _require_length(chat: Chat, tokens: int, length: int) -> None:
    if tokens > length:
        raise UserError(
            f"{chat.where}: {tokens} tokens with those of its {' and '.join(chat.media)}, more than sequence_length "
            f"{length}. Give a longer sequence_length or smaller files, or leave the row out."
        )


class PackedRows:
    """Rows [rows, sequence_length] that fill up with documents one after the other. A token takes 4 bytes."""

    def __init__(self, samples: int, sequence_length: int) -> None:
        self._samples, self._length = samples, sequence_length
        self._ids = array("i")  # a list would take ten times the memory

    @property
    def full(self) -> bool:
        """Whether all rows are filled."""
        return len(self._ids) >= self._samples * self._length

    @property
    def started(self) -> bool:
        """Whether a row is filled."""
        return len(self._ids) >= self._length

    def add(self, ids: list[int], in_one_row: bool = False) -> None:
        """Append the tokens of a document, or as many of them as the row has place for. Full rows take no more."""
        if in_one_row:
            ids = ids[: self._length - len(self._ids) % self._length]
        if not self.full:
            self._ids.extend(ids)

    def rows(self) -> torch.Tensor:
        """The filled rows, int32, without a copy. Nothing can be added afterwards."""
        rows = min(self._samples, len(self._ids) // self._length)
        if rows == 0:  # torch takes no empty buffer
            return torch.empty(0, self._length, dtype=torch.int32)
        return torch.frombuffer(self._ids, dtype=torch.int32, count=rows * self._length).view(rows, self._length)


def batched(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows [samples, sequence_length] as batches of at most BATCH_TOKENS tokens, and of one row at least."""
    return list(rows.split(max(1, BATCH_TOKENS // rows.shape[1])))
