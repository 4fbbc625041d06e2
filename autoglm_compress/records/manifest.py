"""`manifest.json`: the inputs of a run, and its progress."""

from pathlib import Path
from typing import Any

from pydantic import Field

from autoglm_compress.records.files import Record, read_record
from autoglm_compress.records.stage import FileRecord


class SourceRecord(Record):
    """A checkpoint that a run reads but did not make. Only the run's source has a key."""

    folder: str | None = None
    key: str | None = None
    files: dict[str, FileRecord] = Field(default_factory=dict)


class StageEntry(Record):
    """A stage of the recipe; `files` are those of a finished one."""

    name: str
    key: str
    finished: bool
    files: dict[str, FileRecord] = Field(default_factory=dict)
    dropped: bool = False


class Manifest(Record):
    """`manifest.json`. `recipe` has all defaults filled in; `written` is an ISO 8601 time."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    source: SourceRecord = SourceRecord()
    others: dict[str, SourceRecord] = Field(default_factory=dict)
    calibration_key: str | None = None
    seed: int | None = None
    device: str | None = None
    threads: int | None = None
    processes: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    written: str | None = None
    stages: list[StageEntry] = Field(default_factory=list)


def read_manifest(path: Path) -> Manifest:
    """Read a `manifest.json`.

    Raises:
        UserError: the file cannot be read, is not JSON or not as the schema has it.
    """
    return read_record(Manifest, path)
