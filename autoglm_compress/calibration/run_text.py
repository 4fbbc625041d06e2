"""The text of a recipe's calibration sources, as rows of tokens of one model."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from autoglm_compress.calibration import divided_rows, training_rows
from autoglm_compress.calibration.dataset import DatasetSource, fetched
from autoglm_compress.calibration.divided_rows import DividedRows, divided, undivided
from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.reader import Reader, reader_of
from autoglm_compress.calibration.text import documents, locate, shuffled
from autoglm_compress.calibration.tokens import (
    CalibrationOptions,
    batched,
    interleaved,
    packed_rows,
    share_out,
    token_rows,
)
from autoglm_compress.calibration.training_rows import TextPart, rows_to_fetch, set_apart
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress

HELD_OUT_ROWS, HELD_OUT_TOKENS = 16, 1024
"""The most rows and tokens used to check whether one checkpoint still predicts what another predicts."""


def find_sources(options: CalibrationOptions, bases: Sequence[Path]) -> dict[str, Path | None]:
    """The file of every calibration source. None for the built-in source. A dataset is fetched unless it is there.

    Args:
        options: the recipe's `calibration`.
        bases: the folders in which relative paths are looked up, in order.

    Raises:
        UserError: a file or dataset is not there or of an unknown kind, or is named twice.
    """
    if isinstance(options.source, DatasetSource):
        return {options.source.dataset: fetched(options.source, bases)}
    files: dict[str, Path | None] = {}
    for source in options.rows:
        path = locate(source, list(bases), "calibration.source")
        if path in files.values():
            raise UserError(f"calibration.source: {path} is named twice: give it once, with one share.")
        files[source] = path
    return files


def can_be_divided(path: Path | None, reader: Reader | None, length: int, seed: int) -> bool:
    """Whether a source has enough text to set documents apart: one row of so many tokens to decide, and one to fit to.

    Without a reader, every document counts as a row.

    Raises:
        UserError: the source cannot be read.
    """
    if reader is None:
        return all(documents(path, split) for split in ("fitted", "deciding"))
    return all(len(packed_rows(reader, shuffled(path, split, seed), 1, length)) for split in ("fitted", "deciding"))


class CalibrationText:
    """The calibration sources as tokens of one model. Text is read when it is first needed.

    Documents that no stage is fitted to decide about fits. A source with too few documents is not divided: stages are
    fitted to all of it. If no source is divided, some of the fitted rows decide.

    Args:
        options: the recipe's `calibration`.
        files: the file of every source, as `find_sources` gives them.
        model: the model whose tokenizer and vocabulary are used.
        progress: prints a line for a source that is too short.
        longest: tokens of the longest rows that a stage of the run asks for, if longer than those of the options.

    Raises (each property and method):
        UserError: a source cannot be read or does not fill a row, or the tokenizer is not the model's.
    """

    def __init__(
        self,
        options: CalibrationOptions,
        files: Mapping[str, Path | None],
        model: Checkpoint,
        progress: Progress,
        longest: int = 0,
    ) -> None:
        self.options = options
        self.files = files
        self._longest = max(longest, options.sequence_length)
        self._model = model
        self._progress = progress

    @cached_property
    def divided_sources(self) -> list[str]:
        """The sources with documents set apart to decide about fits."""
        reader, seed = self._reader, self.options.seed
        return [source for source, path in self.files.items() if can_be_divided(path, reader, self._longest, seed)]

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Batches of token ids [rows, sequence_length], the rows of all sources interleaved; none of them decides."""
        parts = []
        for source, samples in self.options.rows.items():
            rows = self._rows(source, self._fitted(source), samples)
            if len(rows) < samples:
                self._progress.note(f"warning: {source} fills only {len(rows)} of {samples} samples")
            parts.append(rows)
        return self._batched(interleaved(parts))

    def divided(self) -> DividedRows:
        """Rows of `sequence_length` to fit to and, in place of some of the samples, rows that decide about the fits."""
        if not self.divided_sources:
            return undivided(self.batches)
        samples = self.options.samples
        wanted = divided_rows.deciding_rows(samples)
        shares = {source: share for source, share in self.options.shares.items() if source in self.divided_sources}
        parts = [
            self._rows(source, "deciding", rows) for source, rows in share_out(shares, max(wanted, len(shares))).items()
        ]
        deciding = interleaved(parts)[:wanted]
        self._check_vocabulary(deciding)
        return divided(torch.cat(self.batches)[: samples - len(deciding)], deciding)

    def held_out(self) -> list[torch.Tensor]:
        """A few batches of token ids [rows, sequence_length] from the held-out splits of the sources that have any.

        If no source has any, deciding rows are used. If there are none of these either, the first calibration rows are
        used, with a warning.
        """
        options, found = self.options, []
        wanted = min(options.sequence_length * HELD_OUT_ROWS, HELD_OUT_TOKENS)
        rows = max(1, wanted // options.sequence_length // len(options.rows))
        for source in options.rows:
            with suppress(UserError):
                found.append(self._rows(source, "held-out", rows))
        if not found:
            found = [self._rows(source, "deciding", rows) for source in self.divided_sources]
        if found:
            return self._batched(interleaved(found))
        self._progress.note("warning: too little calibration text to hold any out: the check is on calibration rows")
        return self.batches[:1]

    def training(self, tokens: int, sequence_length: int | None) -> list[TextPart]:
        """Rows of the sources, in their shares, to train on for so many tokens, and rows to judge the training by.

        Rows have `sequence_length` tokens, or as many as the calibration's.
        """
        length = sequence_length or self.options.sequence_length
        wanted = share_out(self.options.shares, max(tokens // length, len(self.files)))
        return [self._part(source, rows, length) for source, rows in wanted.items()]

    def _part(self, source: str, wanted: int, length: int) -> TextPart:
        judged = self.divided_sources or list(self.files)
        most = training_rows.deciding_rows(wanted, length, len(judged))
        if not self.divided_sources:
            rows = self._rows(source, "calibration", rows_to_fetch(wanted, length), length)
            self._check_vocabulary(rows)
            return set_apart(rows.to(torch.int32), wanted, most)
        rows = self._rows(source, self._fitted(source), wanted, length)
        deciding = self._rows(source, "deciding", most, length) if source in judged else rows[:0]
        self._check_vocabulary(rows, deciding)
        return TextPart(rows.to(torch.int32), wanted, deciding.to(torch.int32))

    def _fitted(self, source: str) -> Split:
        """The documents of a source that stages are fitted to."""
        return "fitted" if source in self.divided_sources else "calibration"

    def _rows(self, source: str, split: Split, count: int, length: int | None = None) -> torch.Tensor:
        length = length or self.options.sequence_length
        path, options = self.files[source], self.options
        return token_rows(self._reader, path, split, count, length, options.seed, options.title(path))

    @cached_property
    def _reader(self) -> Reader:
        return reader_of(self._model.folder, self._model.family, self._model.tokenizer())

    @property
    def media(self) -> MediaChats | None:
        """What reads chats with images and sounds; None for a model that reads text alone."""
        return self._reader.media

    def _batched(self, rows: torch.Tensor) -> list[torch.Tensor]:
        self._check_vocabulary(rows)
        return batched(rows)

    def _check_vocabulary(self, *rows: torch.Tensor) -> None:
        """Raise UserError if the model has no embedding for a token."""
        model = self._model
        largest = max(int(part.max()) for part in rows if len(part))
        if largest >= (self.media.end if self.media else model.shape.vocab_size):
            raise UserError(
                f"{model.folder}: the tokenizer gives token {largest}, but config.json has a vocab_size "
                f"of {model.shape.vocab_size}: tokenizer and model do not belong together."
            )
