"""The results of one checkpoint by task, checked before anything is compared."""

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from autoglm_compress.errors import UserError
from autoglm_compress.records.evaluation import DAMAGED, EvaluationRecord, read_evaluation
from autoglm_compress.records.files import validated
from autoglm_compress.records.task_results import RECORDS, Agreement, Finite, Mmlu, Perplexity, TaskRecords

COMPARED = ("mmlu", "perplexity", "agreement")


class TaskMetrics(BaseModel):
    """The metrics of another task of lm-eval, without standard errors."""

    model_config = ConfigDict(frozen=True, strict=True)

    values: dict[str, Finite]
    records: TaskRecords = TaskRecords()


Part = TypeVar("Part", bound=BaseModel)


class Results(BaseModel):
    """The results that a file holds for one checkpoint."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: Path
    mmlu: Mmlu | None
    perplexity: Perplexity | None
    agreement: Agreement | None
    metrics: dict[str, TaskMetrics]


def read_results(path: Path) -> Results:
    """Read a results file of `evaluate`, or a file in the `evaluations` folder of a run.

    Raises:
        UserError: the file does not exist, has another version, or is incomplete.
    """
    record = read_evaluation(path)
    mmlu = _compared(Mmlu, "mmlu", record, path)
    if mmlu is not None:
        _check_unique(mmlu, path)
    others = sorted(record.tasks.keys() - set(COMPARED))
    return Results(
        path=path,
        mmlu=mmlu,
        perplexity=_compared(Perplexity, "perplexity", record, path),
        agreement=_compared(Agreement, "agreement", record, path),
        metrics={name: _metrics(name, record.tasks[name].result, path) for name in others},
    )


def _compared(kind: type[Part], name: str, record: EvaluationRecord, path: Path) -> Part | None:
    if name not in record.tasks:
        return None
    return validated(kind, record.tasks[name].result, path, DAMAGED, _place(name))


def _metrics(name: str, result: dict[str, Any], path: Path) -> TaskMetrics:
    data = {
        "values": {metric: value for metric, value in result.items() if metric != RECORDS and "_stderr" not in metric},
        "records": result.get(RECORDS, {}),
    }
    return validated(TaskMetrics, data, path, DAMAGED, _place(name))


def _place(name: str) -> str:
    """The place of a task's result in a file."""
    return f"tasks.{name}.result."


def _check_unique(mmlu: Mmlu, path: Path) -> None:
    identifier, count = Counter(question.id for question in mmlu.every_question).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: the question {identifier} is there {count} times. {DAMAGED}")
