"""Evaluation results of a run's checkpoints, kept so that nothing is evaluated twice."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.calibration.text import locate, text_key
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.source import local_folder
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.evaluate import evaluate
from autoglm_compress.hashing import key_of, sha256
from autoglm_compress.pipeline.run_folder import RunFolder, read_json
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.evaluation import SCHEMA_VERSION
from autoglm_compress.records.task_results import without_records
from autoglm_compress.resources import Resources
from autoglm_compress.stages.evaluate import Evaluate
from autoglm_compress.versions import package_versions


@dataclass(frozen=True)
class EvaluationData:
    """The files that evaluations read, found before work starts."""

    text: Path | None
    questions: Path | None


def find_data(recipe: Recipe) -> EvaluationData:
    """Locate what the recipe's evaluations read.

    Raises:
        UserError: a file or folder that the recipe names is not there.
    """
    options = recipe.evaluation
    source = options.perplexity.source or next(iter(recipe.calibration.rows))
    text = locate(source, recipe.bases, "evaluation.perplexity.source")
    if options.mmlu.data is None:
        return EvaluationData(text, None)
    questions = local_folder(options.mmlu.data, recipe.bases)
    if questions is None:
        looked = " or in ".join(str(base) for base in recipe.bases)
        raise UserError(f"evaluation.mmlu.data: no folder {options.mmlu.data!r} in {looked}.")
    return EvaluationData(text, questions)


def tasks_of(recipe: Recipe, last: int) -> tuple[str, ...]:
    """Every task that the recipe asks for up to its stage number `last`; the source is evaluated on all of them."""
    asked = list(recipe.evaluation.every_stage)
    for stage in recipe.stages[: last + 1]:
        asked += stage.tasks if isinstance(stage, Evaluate) else ()
    return tuple(dict.fromkeys(asked))


def evaluation_work(folder: Path, evaluated: Any) -> Path:
    """Where an evaluation leaves what lets it go on after a kill with the same scores as if nothing had happened.

    Args:
        folder: where work lies.
        evaluated: what is evaluated and on what device, as plain data. Versions and threads count besides it.
    """
    return folder / f"evaluation-{key_of([evaluated, package_versions(), torch.get_num_threads()])}"


class Evaluations:
    """Evaluates checkpoints with a recipe's settings and remembers the results under `evaluations/`."""

    def __init__(self, recipe: Recipe, data: EvaluationData, folder: RunFolder, device: torch.device) -> None:
        self.recipe = recipe
        self.data = data
        self.folder = folder.path / "evaluations"
        self._work = folder.work
        self.device = device
        self._settings = self._task_settings()

    def _task_settings(self) -> dict[str, Any]:
        options = self.recipe.evaluation
        questions = sorted(self.data.questions.rglob("*.csv")) if self.data.questions else []
        return {
            "perplexity": [options.perplexity.model_dump(), text_key(self.data.text), self.recipe.seed],
            "mmlu": [options.mmlu.model_dump(exclude={"data"}), [[file.name, sha256(file)] for file in questions]],
        }

    def known(self, name: str, key: str) -> dict[str, Any]:
        """The results of a checkpoint by task, as far as they were measured with the settings of now.

        What they say of single questions and rows stays in the file.
        """
        return without_records(self._kept(name, key))

    def has(self, name: str, key: str, tasks: Sequence[str]) -> bool:
        """Whether all of these results of a checkpoint are known."""
        return set(tasks) <= self.known(name, key).keys()

    def _kept(self, name: str, key: str) -> dict[str, Any]:
        record = read_json(self.folder / f"{name}.json")
        if record is None or record["key"] != key:
            return {}
        return {
            task: entry["result"]
            for task, entry in record["tasks"].items()
            if entry["settings"] == self._settings_key(task)
        }

    def _settings_key(self, task: str) -> str:
        return key_of([SCHEMA_VERSION, self._settings.get(task), version("lm_eval")])

    def measure(
        self, name: str, key: str, open_checkpoint: Callable[[], Checkpoint], tasks: Sequence[str], progress: Progress
    ) -> dict[str, Any]:
        """The results of a checkpoint by task, as `known` gives them; only what is not known is measured."""
        known = self._kept(name, key)
        missing = [task for task in tasks if task not in known]
        if missing:
            progress.note(f"{name}: evaluating {', '.join(missing)}")
            checkpoint = open_checkpoint()
            work = evaluation_work(self._work, [key, str(self.device)])
            with Resources() as resources:
                measured = evaluate(
                    checkpoint,
                    missing,
                    self.recipe.evaluation,
                    perplexity_rows=lambda: self._rows(checkpoint),
                    mmlu_folder=self.data.questions,
                    device=self.device,
                    progress=progress,
                    work=work,
                )
            versions = measured.pop("versions")
            known |= measured
            record = {
                "schema_version": SCHEMA_VERSION,
                "key": key,
                "versions": versions,
                "resources": resources.as_data(),
                "tasks": {
                    task: {"settings": self._settings_key(task), "result": result} for task, result in known.items()
                },
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{name}.json", record)
            shutil.rmtree(work, ignore_errors=True)
        return without_records({task: known[task] for task in tasks if task in known})

    def forget(self, name: str, tasks: Sequence[str]) -> None:
        """Drop results, so that the tasks are measured again."""
        path = self.folder / f"{name}.json"
        record = read_json(path)
        if record is not None:
            record["tasks"] = {task: entry for task, entry in record["tasks"].items() if task not in tasks}
            write_json(path, record)

    def resources(self, name: str) -> dict[str, float | int]:
        """Seconds and peak memory of the latest evaluation of a checkpoint."""
        record = read_json(self.folder / f"{name}.json")
        return record["resources"] if record else {"seconds": 0.0, "peak_rss_bytes": 0}

    def _rows(self, checkpoint: Checkpoint) -> torch.Tensor:
        options = self.recipe.evaluation.perplexity
        tokenizer = checkpoint.tokenizer()
        return token_rows(
            tokenizer, self.data.text, "held-out", options.samples, options.sequence_length, self.recipe.seed
        )
