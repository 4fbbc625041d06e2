"""The calibration tokens of a run."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from autoglm_compress.calibration.text import locate
from autoglm_compress.calibration.tokens import CalibrationOptions, batched, interleaved, token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.healing.data import TextPart, rows_to_fetch
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe

HELD_OUT_ROWS, HELD_OUT_TOKENS = 16, 1024
"""How much text decides whether a checkpoint still predicts what another does, at most."""


def calibration_files(recipe: Recipe) -> dict[str, Path | None]:
    """The file of every calibration source, None for the built-in one.

    Raises:
        UserError: a file is not there or of an unknown kind, or is named twice.
    """
    files: dict[str, Path | None] = {}
    for source in recipe.calibration.rows:
        path = locate(source, recipe.bases, "calibration.source")
        if path in files.values():
            raise UserError(f"calibration.source: {path} is named twice: give it once, with one share.")
        files[source] = path
    return files


def calibration_batches(
    options: CalibrationOptions, files: Mapping[str, Path | None], model: Checkpoint, progress: Progress
) -> list[torch.Tensor]:
    """Batches of token ids [rows, sequence_length], the rows of all sources interleaved.

    Raises:
        UserError: a source cannot be read or does not fill a row, or the tokenizer is not the model's.
    """
    tokenizer = model.tokenizer()
    parts = []
    for source, samples in options.rows.items():
        rows = token_rows(tokenizer, files[source], "calibration", samples, options.sequence_length, options.seed)
        if len(rows) < samples:
            progress.note(f"warning: {source} fills only {len(rows)} of {samples} samples")
        parts.append(rows)
    return _checked(interleaved(parts), model)


def training_text(
    options: CalibrationOptions,
    files: Mapping[str, Path | None],
    model: Checkpoint,
    tokens: int,
    sequence_length: int | None,
) -> list[TextPart]:
    """What so many tokens are to be trained on: the calibration splits of the sources, in their shares.

    Raises:
        UserError: a source cannot be read or does not fill a row, or the tokenizer is not the model's.
    """
    length = sequence_length or options.sequence_length
    shares = {"samples": max(tokens // length, len(options.rows)), "sequence_length": length}
    tokenizer, parts = model.tokenizer(), []
    for source, wanted in options.model_copy(update=shares).rows.items():
        enough = rows_to_fetch(wanted, length)
        rows = token_rows(tokenizer, files[source], "calibration", enough, length, options.seed)
        _check_vocabulary(rows, model)
        parts.append(TextPart(rows.to(torch.int32), wanted))
    return parts


def held_out_batches(
    options: CalibrationOptions, files: Mapping[str, Path | None], model: Checkpoint, progress: Progress
) -> list[torch.Tensor]:
    """A few batches of token ids [rows, sequence_length] from the held-out splits of the sources that have any.

    Where none has, they are the first rows of the calibration text, and that is said.
    """
    tokenizer, found = model.tokenizer(), []
    wanted = min(options.sequence_length * HELD_OUT_ROWS, HELD_OUT_TOKENS)
    rows = max(1, wanted // options.sequence_length // len(options.rows))
    for source in options.rows:
        with suppress(UserError):
            found.append(token_rows(tokenizer, files[source], "held-out", rows, options.sequence_length, options.seed))
    if found:
        return _checked(interleaved(found), model)
    progress.note("warning: too little calibration text to hold any out: the check is on calibration rows")
    return calibration_batches(options, files, model, progress)[:1]


def _checked(rows: torch.Tensor, model: Checkpoint) -> list[torch.Tensor]:
    """Rows of tokens in batches, if the model has an embedding for each."""
    _check_vocabulary(rows, model)
    return batched(rows)


def _check_vocabulary(rows: torch.Tensor, model: Checkpoint) -> None:
    if int(rows.max()) >= model.shape.vocab_size:
        raise UserError(
            f"{model.folder}: the tokenizer gives token {int(rows.max())}, but config.json has a vocab_size "
            f"of {model.shape.vocab_size}: tokenizer and model do not belong together."
        )
