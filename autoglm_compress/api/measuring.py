"""Evaluating a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoglm_compress.api.arguments import Device, Place, named_family_in, shown_progress
from autoglm_compress.checked import checked
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.command import EvaluationRequest, evaluate_checkpoint
from autoglm_compress.evaluation.options import EvaluationOptions
from autoglm_compress.problems import from_validation
from autoglm_compress.records.evaluation import EvaluationRecord

TASKS = ("mmlu", "perplexity")


@checked
def evaluate(
    checkpoint: Place,
    output: Place,
    tasks: str | Sequence[str] = TASKS,
    *,
    mmlu: Place | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    text: str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    answers: bool = False,
    generate: Place | None = None,
    ignore: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    against: Place | None = None,
    attention: Place | None = None,
    family: Place | None = None,
    device: Device = "auto",
    progress: bool = False,
) -> EvaluationRecord:
    """Measure a checkpoint, and write a file that `compare` reads. An interrupted evaluation continues where it
    stopped.

    Args:
        checkpoint: a folder with config, tokenizer and safetensors.
        output: the file that results go to.
        tasks: `mmlu`, `perplexity`, `generate` and any log-likelihood task of lm-eval; text is the name of one.
        mmlu: a folder with questions as CSV files in `dev/` and `test/`; MMLU itself, from the hub, by default.
        subjects: of MMLU; all by default.
        limit: questions of each subject, and rows of `generate`, the same every time; all by default.
        num_fewshot: worked examples before each question; 5 by default.
        text: for perplexity, as recipes name it; `python-docs` by default.
        samples: rows of that text; 64 by default.
        sequence_length: tokens of a row; 512 by default, or fewer if the model reads fewer.
        answers: whether perplexity is of the last messages of chats alone.
        generate: a .jsonl file of chats whose last message is the right answer, for the task `generate`.
        ignore: what does not count when answers are compared: `case`, `space`.
        max_new_tokens: of a generated answer; a few more than the longest right one has by default.
        against: a checkpoint to compare predictions with, on the same text.
        attention: an `attention.json` that says how few tokens attention reads; dense attention by default.
        family: a YAML file that describes the model's family, if the family is unknown.
        device: where layers run.
        progress: whether to print how it goes.

    Returns:
        What was written: the result of each task, with the log-likelihoods of every question and row, and the answers.

    Raises:
        UserError: an argument is of a wrong type, an option is not valid, or something that it names is missing or
            malformed.
    """
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    generates, asks = "generate" in names, "mmlu" in names
    questions = {
        "data": None if mmlu is None else str(mmlu),
        "subjects": subjects,
        "limit": limit if asks or not generates else None,
        "num_fewshot": num_fewshot,
    }
    rows = {"source": text, "samples": samples, "sequence_length": sequence_length, "answers": answers or None}
    generated = {
        "data": None if generate is None else str(generate),
        "limit": limit if generates else None,
        "max_new_tokens": max_new_tokens,
        "ignore": ignore,
    }
    request = EvaluationRequest(
        Path(checkpoint),
        names,
        Path(output),
        _evaluation_options(mmlu=_given(questions), perplexity=_given(rows), generate=_given(generated)),
        None if against is None else Path(against),
        device,
        named_family_in(family),
        None if attention is None else Path(attention),
    )
    return evaluate_checkpoint(request, shown_progress(progress))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _evaluation_options(**options: dict[str, Any]) -> EvaluationOptions:
    """Raise UserError if an option is not valid. The message names options as recipes do."""
    try:
        return EvaluationOptions.model_validate(options)
    except ValidationError as error:
        problems = from_validation(error, (), EvaluationOptions)
        lines = (f"{'.'.join(map(str, problem.path))}: {problem.message}" for problem in problems)
        raise UserError("\n".join(lines)) from None
