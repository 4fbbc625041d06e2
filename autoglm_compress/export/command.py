"""Exporting a checkpoint out of a recipe, into a folder that appears when all of it is there."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from autoglm_compress.architecture import Family, require_used
from autoglm_compress.atomic import read_object, write_json
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import PYTHON_DOCS, locate
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.identity import hash_source, key_of_files
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.export.exporting import export, memory_needed
from autoglm_compress.export.formats import FORMATS
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import CONTINUATION, LENGTH, ROWS, proof_scratch
from autoglm_compress.hashing import key_of
from autoglm_compress.memory_limit import PROCESS_BYTES
from autoglm_compress.processes import choose_device
from autoglm_compress.progress import Progress
from autoglm_compress.records.export import ExportRecord
from autoglm_compress.records.files import EXPORT
from autoglm_compress.report.numbers import size
from autoglm_compress.runtime import Runtime
from autoglm_compress.versions import result_versions

SEED = 0
"""Decides which rows of text, as the default of a recipe does."""


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for; `text` is a source of text as recipes name it, `memory_limit` is in bytes."""

    checkpoint: Path
    output: Path
    options: ExportOptions
    text: str | None = None
    device: str = "auto"
    family: Family | None = None
    memory_limit: int | None = None


def export_into(request: ExportRequest, progress: Progress) -> ExportRecord:
    """Export a checkpoint into `request.output`, with a record in `export.json`; returns the record.

    Raises:
        UserError: an option cannot be, the checkpoint cannot be exported, or the engine does not predict the same.
    """
    kind, options, output = FORMATS[request.options.format], request.options, request.output
    _check_output(output)
    text = locate(request.text or PYTHON_DOCS, [Path.cwd()], "--text")
    runtime = Runtime(choose_device(request.device), progress)
    checkpoint = Checkpoint(request.checkpoint, request.family)
    require_used(request.family, checkpoint.family, "--family", str(request.checkpoint / "config.json"))
    checkpoint.require_tokenizer()
    try:
        kind.check(checkpoint.shape, options)
    except PlanError as error:
        raise UserError(f"--{error.option.replace('_', '-')}: {error}.") from None
    kind.check_model(checkpoint.shape, checkpoint.model_config, checkpoint.folder)
    _check_memory(request.memory_limit, PROCESS_BYTES + memory_needed(kind, checkpoint.shape, options))
    for warning in kind.warnings(checkpoint.shape, options):
        progress.note(f"warning: {warning}")
    _check_disk(output, kind.nbytes(checkpoint.shape, options) + proof_scratch(checkpoint.shape))
    held_out = _held_out(checkpoint, text, kind.longest(checkpoint))
    work = output.absolute().with_name(f".{output.absolute().name}.work")
    lock = FileLock(work.with_suffix(".lock"), timeout=0)
    try:
        with lock:
            folder = _begin(work, checkpoint, options)
            job = ExportJob(checkpoint, folder, work, options, runtime)
            record = ExportRecord.model_validate(export(kind, job, held_out))
            record.write(folder / EXPORT)
            checkpoint.require_unchanged()
            if output.exists():
                output.rmdir()  # it was empty
            folder.rename(output)
            shutil.rmtree(work)
    except Timeout:
        raise UserError(f"--output: {output}: another export is at work there. Wait, or give another folder.") from None
    except OSError as error:
        raise UserError(f"--output: {output}: cannot write there: {error.strerror or error}.") from None
    Path(lock.lock_file).unlink(missing_ok=True)
    return record


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: {output}: is there already. Give a folder that is not, or is empty.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no folder {output.absolute().parent}. Make it first, or give another folder.")


def _check_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise UserError(
            f"--output: {output}: the export needs {size(needed)} of disk and {size(free)} are free. "
            "Free some, or give a folder on another disk."
        )


def _check_memory(limit: int | None, needed: int) -> None:
    if limit is not None and needed > limit:
        raise UserError(
            f"--memory-limit: {size(limit)} may not be enough for the export, which takes up to {size(needed)}. "
            "Raise the limit."
        )


def _held_out(checkpoint: Checkpoint, text: Path | None, longest: int) -> list[torch.Tensor]:
    """Rows of text for the proof, as long as it asks for."""
    length = max(2, min(LENGTH + CONTINUATION, longest))
    rows = token_rows(Reader(checkpoint.tokenizer()), text, "held-out", ROWS, length, SEED)
    if int(rows.max()) >= checkpoint.shape.vocab_size:
        raise UserError(f"{checkpoint.folder}: the tokenizer gives token {int(rows.max())}, which the model has not.")
    return [rows]


def _begin(work: Path, checkpoint: Checkpoint, options: ExportOptions) -> Path:
    """The folder that becomes the output, with what a killed process of the same export left there."""
    files = key_of_files(hash_source(checkpoint, {}))
    wanted = {"key": key_of([files, options.model_dump(mode="json")]), "versions": result_versions()}
    folder = work / "result"
    if read_object(work / "key.json") != wanted:
        shutil.rmtree(work, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(work / "key.json", wanted)
    return folder
