"""Evaluating a checkpoint: perplexity, MMLU, any multiple-choice or perplexity task of lm-eval, generated answers."""

import difflib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autoglm_compress.calibration.answers import Exchange
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.generate import asked_rows, generate
from autoglm_compress.evaluation.options import EvaluationOptions, MmluOptions
from autoglm_compress.runtime import Runtime

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM

BUILT_IN = ("perplexity", "mmlu", "generate")
BOOTSTRAP_SAMPLES = 1_000


def check_tasks(tasks: Sequence[str]) -> None:
    """Check task names before work starts; needs no network, and some seconds for names other than the built-in ones.

    Raises:
        UserError: lm-eval has no such task, or it generates text.
    """
    for name in tasks:
        if name in BUILT_IN:
            continue
        index = _task_manager().task_index
        if name not in index:
            near = difflib.get_close_matches(name, [*BUILT_IN, *index], n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the names."
            raise UserError(
                f"unknown evaluation task {name!r}: not perplexity, mmlu, generate or a task of lm-eval. {hint}"
            )
        if _generates(name, index):
            raise UserError(
                f"the evaluation task {name!r} generates text, which layer-at-a-time evaluation does not support. "
                "Choose a multiple-choice or perplexity task, give rows of your own to the task generate, or evaluate "
                "the finished checkpoint in lm-eval itself: "
                f"lm-eval run --model hf --model_args pretrained=FOLDER --tasks {name}"
            )


def _generates(name: str, index: dict[str, Any]) -> bool:
    """Whether a task, or one in a group or tag, generates text, as far as the task files say so."""
    entry = index[name]
    if entry.cfg is None:
        return any(_generates(member, index) for member in entry.tags)
    if isinstance(entry.cfg.get("task"), list):
        members = [member if isinstance(member, str) else member.get("task") for member in entry.cfg["task"]]
        return any(_generates(member, index) for member in members if isinstance(member, str) and member in index)
    return entry.cfg.get("output_type") == "generate_until"


def evaluate(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    options: EvaluationOptions,
    *,
    perplexity_rows: Callable[[], torch.Tensor | list[Exchange]],
    mmlu_folder: Path | None,
    runtime: Runtime,
    generate_file: Path | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Run evaluation tasks on a checkpoint, one decoder layer in memory at a time.

    Args:
        checkpoint: the model and its tokenizer.
        tasks: `perplexity`, `mmlu`, `generate` and names of lm-eval tasks, groups or tags. All but `generate`, which
            has the whole model in memory, are scored a layer at a time.
        options: the settings. `options.mmlu.data` is ignored; `mmlu_folder` is its resolved folder, and likewise
            `generate_file`.
        perplexity_rows: gives the token ids [samples, sequence_length] for perplexity, or the chats whose answers it is
            measured on.
        mmlu_folder: the MMLU questions as CSV files, or None for those of the hub.
        runtime: where layers run.
        generate_file: the rows of `generate`, None without this task.
        work: a folder of this checkpoint, device and versions alone, in which an evaluation that was killed goes on
            where it was; the caller deletes it when the results are safe. None for memory only.

    Returns:
        A JSON-serialisable dictionary: `perplexity`, `mmlu` and `generate` as the functions `perplexity_of`,
        `mmlu_result` and `generate` have them, every other lm-eval task and group under its own name as `task_result`
        has it, and `versions`.

    Raises:
        UserError: a task is unknown or cannot be run here, or its data is missing or malformed.
    """
    # lm-eval takes seconds to import, and most commands do not need it.
    from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
    from autoglm_compress.evaluation.perplexity import pairs_of, perplexity, perplexity_of

    check_tasks(tasks)
    lm = LayerwiseLM(checkpoint, runtime=runtime, title="evaluate", work=work)
    # Errors in a task's data are reported before any task is measured.
    by_lm_eval = set(tasks) - {"perplexity", "generate"}
    questions = _load_questions(tasks, options.mmlu, mmlu_folder) if by_lm_eval else None
    rows = perplexity_rows() if "perplexity" in tasks else None
    pairs = pairs_of(lm, rows) if isinstance(rows, list) else None
    asked = None
    if "generate" in tasks and generate_file is not None:
        asked = asked_rows(generate_file, options.generate, lm.reader, lm.max_length)
    result: dict[str, Any] = {}
    if isinstance(rows, torch.Tensor):
        result["perplexity"] = perplexity(lm, rows)
    if pairs is not None:
        result["perplexity"] = perplexity_of(lm, *pairs)
    if questions is not None:
        result |= _run_lm_eval(lm, questions, options.mmlu.num_fewshot)
    if asked is not None:
        result["generate"] = generate(checkpoint, lm.reader, asked, runtime, work)
    result["versions"] = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    return result


@dataclass(frozen=True)
class _Questions:
    """Tasks and groups of lm-eval by name, MMLU among them or not, and the indices of the questions asked of each of
    its subjects.
    """

    loaded: dict[str, Any]
    mmlu: "Group | None"
    chosen: dict[str, list[int]]


def _load_questions(tasks: Sequence[str], options: MmluOptions, mmlu_folder: Path | None) -> _Questions:
    from autoglm_compress.evaluation.mmlu import chosen_questions, mmlu_group

    with _quiet_lm_eval():
        loaded = _load([name for name in tasks if name not in BUILT_IN])
        if "mmlu" not in tasks:
            return _Questions(loaded, None, {})
        with _loading("mmlu"):
            group = mmlu_group(mmlu_folder, options.num_fewshot, options.subjects)
        loaded["groups"][group.name] = group
        loaded["tasks"] |= {task.task_name: task for task in group.get_all_tasks()}
        return _Questions(loaded, group, chosen_questions(group, options.limit))


def _run_lm_eval(lm: "LayerwiseLM", questions: _Questions, num_fewshot: int) -> dict[str, Any]:
    """All lm-eval tasks in one call, which sends the requests of all of them to the model together."""
    import lm_eval.evaluator

    from autoglm_compress.evaluation.mmlu_result import mmlu_result
    from autoglm_compress.evaluation.task_result import task_result

    with _quiet_lm_eval():
        raw = lm_eval.evaluator.evaluate(
            lm, questions.loaded, samples=questions.chosen, bootstrap_iters=BOOTSTRAP_SAMPLES
        )
    result = {}
    if questions.mmlu is not None:
        result["mmlu"] = mmlu_result(raw, questions.mmlu, num_fewshot)
    for name in raw["results"]:
        if name != "mmlu" and name not in questions.chosen:
            result[name] = task_result(raw, name)
    return result


def _load(names: list[str]) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, set up as its own `simple_evaluate` does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    if not names:
        return {"tasks": {}, "groups": {}}
    # Some tasks shuffle their answer choices with the global generators while they load.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    with _loading(", ".join(names)):
        loaded = _task_manager().load(names)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return {"tasks": dict(loaded["tasks"]), "groups": dict(loaded["groups"])}


@contextmanager
def _loading(names: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # data sets raise many kinds; the user needs one sentence
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"lm-eval could not load {names}: {reason}\n"
            "Check the network; MMLU can also be read from a folder of CSV files (evaluation.mmlu.data, or --mmlu)."
        ) from None


@cache
def _task_manager() -> "TaskManager":
    from lm_eval.tasks import TaskManager

    with _quiet_lm_eval():
        return TaskManager()


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """lm-eval without its log lines and its bar per task: progress is shown by the walk."""
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
