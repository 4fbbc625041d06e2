"""Evaluating a checkpoint out of a recipe, into one file that `compare` reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.calibration.text import PYTHON_DOCS, locate
from autoglm_compress.calibration.tokens import batched, token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.source import local_folder
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.comparison.results_file import SCHEMA_VERSION
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.evaluation.evaluate import EvaluationOptions, check_tasks, evaluate
from autoglm_compress.pipeline.keys import hash_source, text_key
from autoglm_compress.pipeline.resources import Resources
from autoglm_compress.pipeline.run import choose_device, package_versions
from autoglm_compress.progress import Progress

SEED = 0
"""Decides which rows of text, as the default of a recipe does."""
AGREEMENT = "agreement"


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for. `mmlu` and `text` hold the options that were given, by the names they have in a
    recipe's `evaluation.mmlu` and `evaluation.perplexity`.
    """

    checkpoint: Path
    tasks: Sequence[str]
    output: Path
    mmlu: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    against: Path | None = None
    device: str = "auto"


def evaluate_checkpoint(request: EvaluationRequest, progress: Progress) -> dict[str, Any]:
    """Evaluate, and write `request.output`, whole or not at all; returns what was written.

    Raises:
        UserError: an option cannot be, or something that it names is not there or not as it should be.
    """
    _check_request(request)
    options = EvaluationOptions.model_validate({"mmlu": request.mmlu, "perplexity": request.text})
    text = locate(options.perplexity.source or PYTHON_DOCS, [Path.cwd()], "--text")
    questions = _questions(options.mmlu.data)
    device = choose_device(request.device)
    checkpoint = Checkpoint(request.checkpoint)

    def rows(of: Checkpoint) -> torch.Tensor:
        asked = options.perplexity
        found = token_rows(of.tokenizer(), text, "held-out", asked.samples, asked.sequence_length, SEED)
        if of is checkpoint and len(found) < asked.samples:
            progress.note(f"warning: the text fills only {len(found)} of {asked.samples} samples")
        return found

    original = None if request.against is None else _original(request.against, checkpoint, rows)
    with Resources() as resources:
        results = evaluate(
            checkpoint,
            request.tasks,
            options,
            perplexity_rows=lambda: rows(checkpoint),
            mmlu_folder=questions,
            device=device,
            progress=progress,
        )
        del results["versions"]  # they are among those of all packages
        if original is not None:
            found = agreement(original, checkpoint, batched(rows(original)), device, progress)
            results[AGREEMENT] = asdict(found)
    text_settings = options.perplexity.model_dump() | {"text": text_key(text), "seed": SEED}
    settings = {"mmlu": options.mmlu.model_dump(mode="json"), "perplexity": text_settings}
    if original is not None:
        settings[AGREEMENT] = text_settings | {"against": _identity(original)}
    record = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": _identity(checkpoint),
        "tasks": {name: {"settings": settings.get(name, {}), "result": result} for name, result in results.items()},
        "device": str(device),
        "versions": package_versions(),
        "resources": resources.as_data(),
    }
    try:
        write_json(request.output, record)
    except OSError as error:
        raise UserError(f"--output: {request.output}: cannot write there: {error.strerror or error}.") from None
    return record


def _questions(data: str | None) -> Path | None:
    """The folder that --mmlu names."""
    if data is None:
        return None
    folder = local_folder(data, [Path.cwd()])
    if folder is None:
        raise UserError(f"--mmlu: no folder {data!r} in {Path.cwd()}. Give one with dev/ and test/ CSV files.")
    return folder


def _check_request(request: EvaluationRequest) -> None:
    if not all(request.tasks):
        raise UserError(f"--tasks: given {','.join(request.tasks)!r}: expected names with commas between them.")
    check_tasks(request.tasks)
    if request.mmlu and "mmlu" not in request.tasks:
        raise UserError("--mmlu, --subjects, --limit and --num-fewshot are for the task mmlu: add it to --tasks.")
    if request.text and "perplexity" not in request.tasks and request.against is None:
        raise UserError(
            "--text, --samples and --sequence-length are for the task perplexity and for --against: "
            "add perplexity to --tasks."
        )
    if request.output.is_dir():
        raise UserError(f"--output: {request.output} is a folder. Give a file, such as results.json.")
    if not request.output.parent.is_dir():
        raise UserError(f"--output: no folder {request.output.parent}. Make it first, or give another file.")


def _original(folder: Path, checkpoint: Checkpoint, rows: Callable[[Checkpoint], torch.Tensor]) -> Checkpoint:
    """The checkpoint that --against names, if it reads the same text as the same tokens."""
    original = Checkpoint(folder)
    if original.shape.vocab_size != checkpoint.shape.vocab_size:
        raise UserError(
            f"--against: {folder} has a vocab_size of {original.shape.vocab_size}, {checkpoint.folder} of "
            f"{checkpoint.shape.vocab_size}: their predictions cannot be compared. Give the model it was made from."
        )
    if not torch.equal(rows(original), rows(checkpoint)):
        raise UserError(
            f"--against: the tokenizers of {folder} and {checkpoint.folder} give other tokens for the same text. "
            "Give the model it was made from."
        )
    return original


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint is, and the size and SHA-256 of its config, tokenizer and weight files."""
    files = hash_source(checkpoint, {})
    return {
        "folder": str(checkpoint.folder.resolve()),
        "files": {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()},
    }
