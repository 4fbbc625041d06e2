"""The text of a recipe's calibration sources, as rows of tokens of one model."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from autoglm_compress.calibration.text import locate
from autoglm_compress.calibration.tokens import CalibrationOptions, batched, interleaved, token_rows
from autoglm_compress.calibration.training_rows import TextPart, rows_to_fetch
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress

HELD_OUT_ROWS, HELD_OUT_TOKENS = 16, 1024
"""How much text decides whether a checkpoint still predicts what another does, at most."""


def find_sources(options: CalibrationOptions, bases: Sequence[Path]) -> dict[str, Path | None]:
    """The file of every calibration source, None for the built-in one.

    Args:
        options: the recipe's `calibration`.
        bases: the folders in which relative paths are looked up, in order.

    Raises:
        UserError: a file is not there or of an unknown kind, or is named twice.
    """
    files: dict[str, Path | None] = {}
    for source in options.rows:
        path = locate(source, list(bases), "calibration.source")
        if path in files.values():
            raise UserError(f"calibration.source: {path} is named twice: give it once, with one share.")
        files[source] = path
    return files


class CalibrationText:
    """The calibration sources as a model's tokenizer reads them; nothing is read before it is asked for.

    Args:
        options: the recipe's `calibration`.
        files: the file of every source, as `find_sources` gives them.
        model: whose tokenizer and vocabulary count.
        progress: where a source that is too short is named.

    Raises (each property and method):
        UserError: a source cannot be read or does not fill a row, or the tokenizer is not the model's.
    """

    def __init__(
        self, options: CalibrationOptions, files: Mapping[str, Path | None], model: Checkpoint, progress: Progress
    ) -> None:
        self.options = options
        self.files = files
        self._model = model
        self._progress = progress

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Batches of token ids [rows, sequence_length], the rows of all sources interleaved."""
        parts = []
        for source, samples in self.options.rows.items():
            rows = self._rows(source, "calibration", samples)
            if len(rows) < samples:
                self._progress.note(f"warning: {source} fills only {len(rows)} of {samples} samples")
            parts.append(rows)
        return self._batched(interleaved(parts))

    def held_out(self) -> list[torch.Tensor]:
        """A few batches of token ids [rows, sequence_length] from the held-out splits of the sources that have any.

        Where none has, they are the first rows of the calibration text, and that is said.
        """
        options, found = self.options, []
        wanted = min(options.sequence_length * HELD_OUT_ROWS, HELD_OUT_TOKENS)
        rows = max(1, wanted // options.sequence_length // len(options.rows))
        for source in options.rows:
            with suppress(UserError):
                found.append(self._rows(source, "held-out", rows))
        if found:
            return self._batched(interleaved(found))
        self._progress.note("warning: too little calibration text to hold any out: the check is on calibration rows")
        return self.batches[:1]

    def training(self, tokens: int, sequence_length: int | None) -> list[TextPart]:
        """What so many tokens are to be trained on: the calibration splits of the sources, in their shares.

        Rows have `sequence_length` tokens, or as many as the calibration's.
        """
        length = sequence_length or self.options.sequence_length
        shares = {"samples": max(tokens // length, len(self.options.rows)), "sequence_length": length}
        parts = []
        for source, wanted in self.options.model_copy(update=shares).rows.items():
            rows = self._rows(source, "calibration", rows_to_fetch(wanted, length), length)
            self._check_vocabulary(rows)
            parts.append(TextPart(rows.to(torch.int32), wanted))
        return parts

    def _rows(self, source: str, split: str, count: int, length: int | None = None) -> torch.Tensor:
        length = length or self.options.sequence_length
        return token_rows(self._tokenizer, self.files[source], split, count, length, self.options.seed)

    @cached_property
    def _tokenizer(self) -> object:
        return self._model.tokenizer()

    def _batched(self, rows: torch.Tensor) -> list[torch.Tensor]:
        self._check_vocabulary(rows)
        return batched(rows)

    def _check_vocabulary(self, rows: torch.Tensor) -> None:
        """Raise UserError if the model has no embedding for a token."""
        model = self._model
        if int(rows.max()) >= model.shape.vocab_size:
            raise UserError(
                f"{model.folder}: the tokenizer gives token {int(rows.max())}, but config.json has a vocab_size "
                f"of {model.shape.vocab_size}: tokenizer and model do not belong together."
            )
