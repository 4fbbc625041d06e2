"""The results of evaluating a checkpoint: a file of `evaluate`, or one of the folder `evaluations` of a run."""

from pathlib import Path
from typing import Any

from pydantic import Field

from autoglm_compress.errors import UserError
from autoglm_compress.records.files import Record, load_json, validated
from autoglm_compress.records.stage import FileRecord

SCHEMA_VERSION = 1
"""The schema version of files with evaluation results. Raise it when the fields that `compare` reads change."""
EVALUATE_AGAIN = "Evaluate again."
DAMAGED = "The file is damaged: evaluate again."


class TaskEntry(Record):
    """The result of a task, and what it depends on: the settings, or in a run a hash of them."""

    settings: str | dict[str, Any] = ""
    result: dict[str, Any]


class Spent(Record):
    """The cost of an evaluation: seconds, bytes, and the number of processes."""

    seconds: float | None = None
    processes: int | None = None
    cpu_seconds: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    peak_rss_bytes: int | None = None


class CheckpointRecord(Record):
    """Where the checkpoint was, and its files by name."""

    folder: str
    files: dict[str, FileRecord]


class EvaluationRecord(Record):
    """The measurements of one checkpoint.

    A run identifies the checkpoint by its `key`. `evaluate` records its files in `checkpoint`, and the `device`.
    """

    schema_version: int | None = None
    key: str | None = None
    checkpoint: CheckpointRecord | None = None
    tasks: dict[str, TaskEntry] = Field(default_factory=dict)
    device: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    resources: Spent = Spent()


def read_evaluation(path: Path) -> EvaluationRecord:
    """Read results to compare with others.

    Raises:
        UserError: the file does not exist, has another version, or is incomplete.
    """
    data = load_json(path, EVALUATE_AGAIN, "not valid JSON", "Give a file that autoglm-compress evaluate wrote.")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}.")
    _check_version(data, path)
    tasks = data.get("tasks")
    if not isinstance(tasks, dict):
        raise UserError(f"{path}: tasks: expected an object with a result for each task. {EVALUATE_AGAIN}")
    for name, entry in tasks.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("result"), dict):
            raise UserError(f"{path}: tasks.{name}.result: missing. {EVALUATE_AGAIN}")
    return validated(EvaluationRecord, data, path, DAMAGED)


def _check_version(data: dict[str, Any], path: Path) -> None:
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
