"""Reading what `evaluate` wrote, checked before anything is compared."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoglm_compress.errors import UserError

SCHEMA_VERSION = 1
"""Of files with evaluation results: raised when what is read here changes."""
MOST_NATS = 500.0
"""Of a mean over tokens: far more than any model gives, and its exponential is still a number."""
COMPARED = ("mmlu", "perplexity")

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Question(_Model):
    """One question: `log_likelihoods` of the answers A to D in nats, and whether the likeliest is right."""

    id: str
    log_likelihoods: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    choice: Literal["A", "B", "C", "D"]
    right: bool


class Subject(_Model):
    """The questions of a subject, its category if it is one of MMLU's, and a hash of the prompts it was asked with."""

    category: str | None
    prompts: str
    records: Annotated[list[Question], Field(min_length=1)]


class Mmlu(_Model):
    """The result of the task `mmlu`."""

    num_fewshot: int
    subjects: Annotated[dict[str, Subject], Field(min_length=1)]

    @property
    def questions(self) -> list[Question]:
        """All questions, subject by subject."""
        return [question for subject in self.subjects.values() for question in subject.records]


class Perplexity(_Model):
    """The result of the task `perplexity`: the mean negative log-likelihood of each row, in nats per token."""

    text: str
    rows: Annotated[list[Annotated[Finite, Field(ge=0, le=MOST_NATS)]], Field(min_length=2)]


Part = TypeVar("Part", bound=_Model)


class Results(_Model):
    """What a file says of one checkpoint."""

    path: Path
    mmlu: Mmlu | None
    perplexity: Perplexity | None
    others: tuple[str, ...]


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
        others=tuple(sorted(set(tasks) - set(COMPARED))),
    )


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


def _result(tasks: dict[str, Any], name: str, path: Path) -> Any:
    if name not in tasks:
        return None
    if not isinstance(tasks[name], dict) or tasks[name].get("result") is None:
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
    identifier, count = Counter(question.id for question in mmlu.questions).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{path}: the question {identifier} is there {count} times. The file is damaged: evaluate again."
        )
