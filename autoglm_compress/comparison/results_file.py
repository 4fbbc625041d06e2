"""Reading what `evaluate` wrote, checked before anything is compared."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autoglm_compress.comparison.mmlu_scores import Finite, MmluScores, Scores
from autoglm_compress.errors import UserError

SCHEMA_VERSION = 1
"""Of files with evaluation results: raised when what is read here changes."""
MOST_NATS = 500.0
"""Of a mean over tokens: far more than any model gives, and its exponential is still a number."""
RECORDS = "records"
COMPARED = ("mmlu", "perplexity", "agreement")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Question(_Model):
    """One question: `log_likelihoods` of the answers A to D in nats, and whether the likeliest is right."""

    id: str
    log_likelihoods: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    choice: Literal["A", "B", "C", "D"]
    right: bool


class Subject(Scores):
    """The questions of a subject, its category if it is one of MMLU's, and a hash of the prompts it was asked with."""

    category: str | None
    prompts: str
    records: Annotated[list[Question], Field(min_length=1)]


class Mmlu(MmluScores[Subject]):
    """The result of the task `mmlu`, with every question."""

    num_fewshot: int
    subjects: Annotated[dict[str, Subject], Field(min_length=1)]

    @property
    def every_question(self) -> list[Question]:
        """All questions, subject by subject."""
        return [question for subject in self.subjects.values() for question in subject.records]


class Perplexity(_Model):
    """The result of the task `perplexity`: the mean negative log-likelihood of each row, in nats per token."""

    text: str
    rows: Annotated[list[Annotated[Finite, Field(ge=0, le=MOST_NATS)]], Field(min_length=2)]


Rows = Annotated[list[Finite], Field(min_length=2)]


class AgreementRows(_Model):
    """Of each row of tokens the mean divergence in nats, and the share with the same likeliest next token."""

    divergence: Rows
    top1: Rows


class Agreement(_Model):
    """What `evaluate --against` measured: `text` and `against` are hashes of the tokens and of the other checkpoint.

    Earlier versions wrote neither, and no `rows`.
    """

    divergence: Finite
    top1: Annotated[float, Field(ge=0, le=1)]
    text: str | None = None
    against: str | None = None
    rows: AgreementRows | None = None

    @model_validator(mode="after")
    def _same_rows(self) -> "Agreement":
        if self.rows is not None and len(self.rows.divergence) != len(self.rows.top1):
            raise ValueError("rows.divergence and rows.top1 are not of the same length")
        return self


class TaskRecords(_Model):
    """Of a task of lm-eval: a hash of the documents and prompts and one of all answers, by metric whether more is
    better (absent or None: not known) and, where the metric is a mean over the documents, its value for each.
    """

    documents: str | None = None
    responses: str | None = None
    higher_is_better: dict[str, bool | None] = Field(default_factory=dict)
    values: dict[str, list[Finite]] = Field(default_factory=dict)


class TaskMetrics(_Model):
    """The metrics of another task of lm-eval, without standard errors."""

    values: dict[str, Finite]
    records: TaskRecords = TaskRecords()


Part = TypeVar("Part", bound=BaseModel)


class Results(_Model):
    """What a file says of one checkpoint."""

    path: Path
    mmlu: Mmlu | None
    perplexity: Perplexity | None
    agreement: Agreement | None
    metrics: dict[str, TaskMetrics]


def read_results(path: Path) -> Results:
    """Read a results file of `evaluate`, or a file in the `evaluations` folder of a run.

    Raises:
        UserError: there is no such file, it is of another version, or not whole.
    """
    tasks = _tasks(_object(path), path)
    results = {name: _result(tasks, name, path) for name in COMPARED}
    mmlu = _validated(Mmlu, results["mmlu"], path, "tasks.mmlu.result")
    if mmlu is not None:
        _check_unique(mmlu, path)
    return Results(
        path=path,
        mmlu=mmlu,
        perplexity=_validated(Perplexity, results["perplexity"], path, "tasks.perplexity.result"),
        agreement=_validated(Agreement, results["agreement"], path, "tasks.agreement.result"),
        metrics={name: _metrics(tasks, name, path) for name in sorted(set(tasks) - set(COMPARED))},
    )


def _metrics(tasks: dict[str, Any], name: str, path: Path) -> TaskMetrics:
    result = _result(tasks, name, path)
    data = {
        "values": {metric: value for metric, value in result.items() if metric != RECORDS and "_stderr" not in metric},
        "records": result.get(RECORDS, {}),
    }
    return _validated(TaskMetrics, data, path, f"tasks.{name}.result")


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be read: {reason}. Give a file that autoglm-compress evaluate wrote."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}. Evaluate again.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    return data


def _tasks(data: dict[str, Any], path: Path) -> dict[str, Any]:
    found = data.get("schema_version")
    if found is None:
        raise UserError(
            f"{path}: schema_version: missing: expected {SCHEMA_VERSION}. Give a results file of autoglm-compress "
            "evaluate, or a run's evaluations/NAME.json; if an earlier version wrote it, evaluate again."
        )
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version: given {found!r}: this version of autoglm-compress reads {SCHEMA_VERSION}. "
            "Evaluate again with it."
        )
    tasks = data.get("tasks")
    if not isinstance(tasks, dict):
        raise UserError(f"{path}: tasks: expected an object with a result for each task. Evaluate again.")
    return tasks


def _result(tasks: dict[str, Any], name: str, path: Path) -> dict[str, Any] | None:
    if name not in tasks:
        return None
    if not isinstance(tasks[name], dict) or not isinstance(tasks[name].get("result"), dict):
        raise UserError(f"{path}: tasks.{name}.result: missing. Evaluate again.")
    return tasks[name]["result"]


def _validated(kind: type[Part], data: Any, path: Path, where: str) -> Part | None:
    if data is None:
        return None
    try:
        return kind.model_validate(data)
    except ValidationError as problems:
        first = problems.errors()[0]
        field = ".".join(map(str, (where, *first["loc"])))
        raise UserError(f"{path}: {field}: {first['msg']}. The file is damaged: evaluate again.") from None


def _check_unique(mmlu: Mmlu, path: Path) -> None:
    identifier, count = Counter(question.id for question in mmlu.every_question).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{path}: the question {identifier} is there {count} times. The file is damaged: evaluate again."
        )
