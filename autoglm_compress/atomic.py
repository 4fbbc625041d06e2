"""Writing files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Empty if the file is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Write JSON that appears under its name only when it is complete and on the disk."""
    with appearing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name for a file. The file gets its final name when it is complete and on disk, and is deleted on
    errors.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
