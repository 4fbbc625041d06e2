"""Evaluating a checkpoint without a recipe, into one file that `compare` reads."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import Family, require_used
from autoglm_compress.attention.settings import SparseAttention
from autoglm_compress.calibration.answers import Exchange, held_out_answers
from autoglm_compress.calibration.reader import Reader, reader_of
from autoglm_compress.calibration.text import PYTHON_DOCS, locate, locate_rows, text_key
from autoglm_compress.calibration.tokens import batched, fitted_rows, token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.identity import hash_source, key_of_files
from autoglm_compress.checkpoint.plain_verdict import require_loadable
from autoglm_compress.checkpoint.source import local_folder
from autoglm_compress.errors import UserError, listed
from autoglm_compress.evaluation.agreement import Agreement, agreement
from autoglm_compress.evaluation.checks import Names, RowChecks, require_text
from autoglm_compress.evaluation.evaluate import check_tasks, evaluate
from autoglm_compress.evaluation.options import EvaluationOptions, PerplexityOptions
from autoglm_compress.evaluation.perplexity import hash_of_rows
from autoglm_compress.evaluation.run_results import EvaluationData
from autoglm_compress.evaluation.walk_store import evaluation_work
from autoglm_compress.processes import choose_device
from autoglm_compress.progress import Progress
from autoglm_compress.records.evaluation import SCHEMA_VERSION, CheckpointRecord, EvaluationRecord, Spent, TaskEntry
from autoglm_compress.resources import Resources
from autoglm_compress.runtime import Runtime
from autoglm_compress.versions import package_versions

SEED = 0
"""The seed that selects rows of text, as in a recipe by default."""
AGREEMENT = "agreement"
NAMES = Names("--text", "--answers")


@dataclass(frozen=True)
class EvaluationRequest:
    """The request of an evaluation. Only the requested fields of `options` are set."""

    checkpoint: Path
    tasks: Sequence[str]
    output: Path
    options: EvaluationOptions
    against: Path | None = None
    device: str = "auto"
    family: Family | None = None
    attention: Path | None = None


def evaluate_checkpoint(request: EvaluationRequest, progress: Progress) -> EvaluationRecord:
    """Evaluate, and write `request.output`, whole or not at all; returns what was written.

    Raises:
        UserError: an option is not valid, or something that it names is missing or malformed.
    """
    _check_request(request)
    options = request.options
    text = locate(options.perplexity.source or PYTHON_DOCS, [Path.cwd()], "--text")
    rows = options.generate.data
    generate = None if rows is None else locate_rows(rows, [Path.cwd()], "--generate")
    data = EvaluationData(text, _questions(options.mmlu.data), generate)
    device = choose_device(request.device)
    runtime = Runtime(device, progress)
    checkpoint = Checkpoint(request.checkpoint, request.family)
    if checkpoint.left_out:
        progress.note(f"left out, as the model does not use them: {listed(checkpoint.left_out)}")
    require_used(request.family, checkpoint.family, "--family", str(request.checkpoint / "config.json"))
    require_loadable(checkpoint)
    longest = getattr(checkpoint.model_config, "max_position_embeddings", None)
    options = options.model_copy(update={"perplexity": fitted_rows(options.perplexity, longest)})
    checkpoint.attention = _attention(request.attention, checkpoint, options.perplexity, progress)

    reader = reader_of(checkpoint.folder, checkpoint.family, checkpoint.tokenizer())
    RowChecks(options, data, reader, longest, SEED, NAMES).check(request.tasks)
    if request.against is not None:
        require_text(text, NAMES)
    text_rows = cache(lambda: _rows(checkpoint, text, options.perplexity, progress))
    original = None if request.against is None else Checkpoint(request.against, request.family)
    if original is not None:
        require_loadable(original)
        _check_same_tokens(original, checkpoint, text_rows(), _rows(original, text, options.perplexity))
    identity, against = _identity(checkpoint), None if original is None else _identity(original)
    sparse = None if checkpoint.attention is None else checkpoint.attention.model_dump(mode="json")
    if sparse is not None:
        identity["attention"] = sparse
    works = request.output.with_name(f".{request.output.name}.work")
    work = evaluation_work(works, [identity["files"], sparse, against and against["files"], str(device)])
    if work.exists():
        progress.note("going on where an earlier evaluation stopped")
    with Resources() as resources:
        results = evaluate(
            checkpoint,
            request.tasks,
            options,
            perplexity_rows=lambda: _answers(text, options.perplexity) or text_rows(),
            mmlu_folder=data.questions,
            generate_file=data.generate,
            runtime=runtime,
            work=work,
        )
        del results["versions"]  # they are among the versions of all packages
        if original is not None and against is not None:
            found = agreement(original, checkpoint, batched(text_rows()), runtime, work / "agreement")
            results[AGREEMENT] = _agreement_result(found, text_rows(), key_of_files(against["files"]))
    text_settings = options.perplexity.model_dump() | {"text": text_key(text), "seed": SEED}
    settings = {
        "mmlu": options.mmlu.model_dump(mode="json"),
        "perplexity": text_settings,
        "generate": options.generate.model_dump(mode="json"),
    }
    if original is not None:
        settings[AGREEMENT] = text_settings | {"against": against}
    record = EvaluationRecord(
        schema_version=SCHEMA_VERSION,
        checkpoint=CheckpointRecord.model_validate(identity),
        tasks={name: TaskEntry(settings=settings.get(name, {}), result=result) for name, result in results.items()},
        device=str(device),
        versions=package_versions(),
        resources=Spent(**resources.as_data()),
    )
    try:
        record.write(request.output)
    except OSError as error:
        raise UserError(f"--output: {request.output}: cannot write there: {error.strerror or error}.") from None
    shutil.rmtree(works, ignore_errors=True)
    return record


def _attention(
    file: Path | None, checkpoint: Checkpoint, rows: PerplexityOptions, progress: Progress
) -> SparseAttention | None:
    """What --attention names. Prints a warning if rows are read whole."""
    if file is None:
        return None
    found = SparseAttention.load(file)
    found.require_layers(checkpoint.shape.num_hidden_layers, file)
    if rows.sequence_length < found.dense_below:
        progress.note(
            f"warning: dense_below is {found.dense_below}: rows of {rows.sequence_length} tokens are read whole. Give "
            "--sequence-length, or dense_below: 0 in the file"
        )
    return found


def _rows(
    checkpoint: Checkpoint, text: Path | None, options: PerplexityOptions, progress: Progress | None = None
) -> torch.Tensor:
    """The text as a checkpoint's token ids [samples, sequence_length]. Prints a warning if there is too little text."""
    found = token_rows(Reader(checkpoint.tokenizer()), text, "held-out", options.samples, options.sequence_length, SEED)
    if progress is not None and len(found) < options.samples:
        progress.note(f"warning: the text fills only {len(found)} of {options.samples} samples")
    return found


def _answers(text: Path | None, options: PerplexityOptions) -> list[Exchange]:
    """The chats whose answers perplexity is measured on; none where it is measured on text."""
    return held_out_answers(text, options.samples, SEED) if options.answers and text is not None else []


def _agreement_result(found: Agreement, rows: torch.Tensor, against: str) -> dict[str, Any]:
    """`rows` has the values of each row, whose means are the results."""
    return {
        "divergence": found.divergence,
        "logit_error": found.logit_error,
        "top1": found.top1,
        "tokens": found.tokens,
        "text": hash_of_rows(rows),
        "against": against,
        "rows": {"divergence": list(found.row_divergence), "top1": list(found.row_top1)},
    }


def _questions(data: str | None) -> Path | None:
    """The folder that --mmlu names."""
    if data is None:
        return None
    folder = local_folder(data, [Path.cwd()])
    if folder is None:
        raise UserError(f"--mmlu: no folder {data!r} in {Path.cwd()}. Give one with dev/ and test/ CSV files.")
    return folder


def _check_request(request: EvaluationRequest) -> None:
    if not request.tasks:
        raise UserError("--tasks: none given: name one or more, such as perplexity.")
    if not all(request.tasks):
        raise UserError(f"--tasks: given {','.join(request.tasks)!r}: expected names with commas between them.")
    check_tasks(request.tasks)
    if request.options.mmlu.model_fields_set and "mmlu" not in request.tasks:
        raise UserError("--mmlu, --subjects, --limit and --num-fewshot are for the task mmlu: add it to --tasks.")
    if request.options.perplexity.model_fields_set and "perplexity" not in request.tasks and request.against is None:
        raise UserError(
            "--text, --samples, --sequence-length and --answers are for the task perplexity and for --against: "
            "add perplexity to --tasks."
        )
    if request.options.generate.model_fields_set and "generate" not in request.tasks:
        raise UserError("--generate, --ignore and --max-new-tokens are for the task generate: add it to --tasks.")
    if "generate" in request.tasks and request.options.generate.data is None:
        raise UserError("--tasks: generate has no rows: give --generate FILE, chats whose last message is the answer.")
    if request.output.is_dir():
        raise UserError(f"--output: {request.output} is a folder. Give a file, such as results.json.")
    if not request.output.parent.is_dir():
        raise UserError(f"--output: no folder {request.output.parent}. Make it first, or give another file.")


def _check_same_tokens(
    original: Checkpoint, checkpoint: Checkpoint, rows: torch.Tensor, original_rows: torch.Tensor
) -> None:
    """Whether the checkpoint that --against names reads the same text as the same tokens."""
    if original.shape.vocab_size != checkpoint.shape.vocab_size:
        raise UserError(
            f"--against: {original.folder} has a vocab_size of {original.shape.vocab_size}, {checkpoint.folder} of "
            f"{checkpoint.shape.vocab_size}: their predictions cannot be compared. Give the model it was made from."
        )
    if not torch.equal(rows, original_rows):
        raise UserError(
            f"--against: the tokenizers of {original.folder} and {checkpoint.folder} give other tokens for the same "
            "text. Give the model it was made from."
        )


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint is, and the size and SHA-256 of its config, tokenizer and weight files."""
    files = hash_source(checkpoint, {})
    return {
        "folder": str(checkpoint.folder),
        "files": {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()},
    }
