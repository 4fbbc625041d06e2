"""The calibration tokens of a run."""

from collections.abc import Mapping
from pathlib import Path

import torch

from autoglm_compress.calibration.text import locate
from autoglm_compress.calibration.tokens import CalibrationOptions, batched, interleaved, token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe


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
    rows = interleaved(parts)
    if int(rows.max()) >= model.shape.vocab_size:
        raise UserError(
            f"{model.folder}: the tokenizer gives token {int(rows.max())}, but config.json has a vocab_size "
            f"of {model.shape.vocab_size}: tokenizer and model do not belong together."
        )
    return batched(rows)
