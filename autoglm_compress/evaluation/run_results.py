"""Evaluation results of a run's checkpoints, kept so that nothing is evaluated twice."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.calibration.answers import Exchange, held_out_answers
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import locate, locate_rows, text_key
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.source import local_folder
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.evaluate import evaluate
from autoglm_compress.evaluation.options import EvaluationOptions
from autoglm_compress.evaluation.questions import files_shown
from autoglm_compress.evaluation.walk_store import evaluation_work
from autoglm_compress.hashing import key_of, sha256
from autoglm_compress.records.evaluation import (
    SCHEMA_VERSION,
    EvaluationRecord,
    Spent,
    TaskEntry,
)
from autoglm_compress.records.files import found
from autoglm_compress.records.task_results import without_records
from autoglm_compress.resources import Resources
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class EvaluationData:
    """The files that evaluations read, found before work starts.

    None stands for a built-in text, for the hub, and for no rows to generate answers for.
    """

    text: Path | None
    questions: Path | None
    generate: Path | None = None


def find_data(options: EvaluationOptions, bases: list[Path], default_text: Path | None) -> EvaluationData:
    """Locate what evaluations read.

    Args:
        options: the recipe's.
        bases: the folders in which relative paths are looked up, in order.
        default_text: the file of the text where the options name none, None for the built-in one.

    Raises:
        UserError: a file or folder that the options name does not exist.
    """
    source = options.perplexity.source
    text = default_text if source is None else locate(source, bases, "evaluation.perplexity.source")
    rows = options.generate.data
    generate = None if rows is None else locate_rows(rows, bases, "evaluation.generate.data")
    if options.mmlu.data is None:
        return EvaluationData(text, None, generate)
    questions = local_folder(options.mmlu.data, bases)
    if questions is None:
        looked = " or in ".join(str(base) for base in bases)
        raise UserError(f"evaluation.mmlu.data: no folder {options.mmlu.data!r} in {looked}.")
    return EvaluationData(text, questions, generate)


class Evaluations:
    """Evaluates checkpoints with a recipe's settings and remembers the results, in a file for each checkpoint."""

    def __init__(
        self,
        options: EvaluationOptions,
        data: EvaluationData,
        *,
        folder: Path,
        work: Path,
        seed: int,
        runtime: Runtime,
    ) -> None:
        """Hash everything that results depend on.

        Args:
            options: the tasks and their settings.
            data: the files that are read.
            folder: where results are kept.
            work: the folder from which a killed evaluation continues.
            seed: decides which rows of text.
            runtime: where layers run.
        """
        self.options = options
        self.data = data
        self.folder = folder
        self.seed = seed
        self.runtime = runtime
        self._work = work
        self._settings = self._task_settings()

    def _task_settings(self) -> dict[str, Any]:
        options = self.options
        questions, rows = self.data.questions, self.data.generate
        asked = sorted(questions.rglob("*.csv")) + files_shown(questions) if questions else []
        return {
            "perplexity": [options.perplexity.model_dump(), text_key(self.data.text), self.seed],
            "mmlu": [options.mmlu.model_dump(exclude={"data"}), [[file.name, sha256(file)] for file in asked]],
            "generate": [options.generate.model_dump(exclude={"data"}), None if rows is None else text_key(rows)],
        }

    def known(self, name: str, key: str) -> dict[str, Any]:
        """The known results of a checkpoint by task, as far as they were measured with the present settings.

        Results of single questions and rows are left out; the file has them.
        """
        return without_records(self._kept(name, key))

    def has(self, name: str, key: str, tasks: Sequence[str]) -> bool:
        """Whether all of these results of a checkpoint are known."""
        return set(tasks) <= self.known(name, key).keys()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _kept(self, name: str, key: str) -> dict[str, dict[str, Any]]:
        record = found(EvaluationRecord, self._file(name))
        if record is None or record.key != key:
            return {}
        return {task: kept.result for task, kept in record.tasks.items() if kept.settings == self.settings_key(task)}

    def settings_key(self, task: str) -> str:
        """A hash of everything but the checkpoint that a task's result depends on."""
        return key_of([SCHEMA_VERSION, self._settings.get(task), version("lm_eval")])

    def results(
        self, name: str, key: str, open_checkpoint: Callable[[], Checkpoint], tasks: Sequence[str]
    ) -> dict[str, Any]:
        """The results of a checkpoint by task, as `known` gives them. Missing results are measured."""
        known = self._kept(name, key)
        missing = [task for task in tasks if task not in known]
        if missing:
            self.runtime.progress.note(f"{name}: evaluating {', '.join(missing)}")
            checkpoint = open_checkpoint()
            work = evaluation_work(self._work, [key, str(self.runtime.device)])
            with Resources() as resources:
                measured = evaluate(
                    checkpoint,
                    missing,
                    self.options,
                    perplexity_rows=lambda: self._rows(checkpoint),
                    mmlu_folder=self.data.questions,
                    generate_file=self.data.generate,
                    runtime=self.runtime,
                    work=work,
                )
            versions = measured.pop("versions")
            known |= measured
            record = EvaluationRecord(
                schema_version=SCHEMA_VERSION,
                key=key,
                tasks={
                    task: TaskEntry(settings=self.settings_key(task), result=result) for task, result in known.items()
                },
                versions=versions,
                resources=Spent(**resources.as_data()),
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            record.write(self._file(name))
            shutil.rmtree(work, ignore_errors=True)
        return without_records({task: known[task] for task in tasks if task in known})

    def forget(self, name: str, tasks: Sequence[str]) -> None:
        """Drop results, so that the tasks are measured again."""
        record = found(EvaluationRecord, self._file(name))
        if record is not None:
            kept = {task: entry for task, entry in record.tasks.items() if task not in tasks}
            record.model_copy(update={"tasks": kept}).write(self._file(name))

    def resources(self, name: str) -> dict[str, Any]:
        """Seconds and peak memory of the latest evaluation of a checkpoint."""
        record = found(EvaluationRecord, self._file(name))
        return record.resources.as_data() if record else {"seconds": 0.0, "peak_rss_bytes": 0}

    def _rows(self, checkpoint: Checkpoint) -> torch.Tensor | list[Exchange]:
        options = self.options.perplexity
        if options.answers and self.data.text is not None:  # checked before the run
            return held_out_answers(self.data.text, options.samples, self.seed)
        reader = Reader(checkpoint.tokenizer())
        return token_rows(reader, self.data.text, "held-out", options.samples, options.sequence_length, self.seed)
