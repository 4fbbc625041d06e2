"""Writing and reading records. A damaged file gives one clear message."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from autoglm_compress.atomic import write_json
from autoglm_compress.errors import UserError

STAGE = "stage.json"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
LINEAGE = "lineage.json"
CHOSEN = "recipe.yaml"
"""What the stage `shape` chose, with the paths of this machine."""
EXPORT = "export.json"
SOURCE = "source"
SOURCE_FOLDER_NAME = f"00-{SOURCE}"
"""The source's name where it stands among stages: in `evaluations/`, and as a parent."""
RUN_AGAIN = "Run the recipe again with the same --output: finished stages are kept, and the file is written anew."


class Record(BaseModel):
    """A record, or a part of one. Fields that older versions did not write may be absent.

    Unknown fields of other versions are kept, so that reading and writing a file loses nothing.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=(), extra="allow")

    def as_data(self) -> dict[str, Any]:
        """The content of the file as plain data: the fields that are set, in the order of the schema."""
        return self.model_dump(exclude_unset=True)

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all.

        Raises:
            OSError: the disk is full or the folder cannot be written to.
        """
        write_json(path, self.as_data())


Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def found(model: type[Model], path: Path) -> Model | None:
    """The record of a file. None if the file is absent or damaged: its content is then made again."""
    try:
        return model.model_validate(read_json(path))
    except ValidationError:
        return None


def load_json(path: Path, remedy: str, not_json: str = "not JSON", unreadable: str = "") -> Any:
    """The content of a JSON file that must be there.

    Args:
        path: of the file.
        remedy: what a message tells the user to do about a damaged file.
        not_json: the words of the message for content that is not JSON.
        unreadable: what the message tells the user to do about a file that cannot be read.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {not_json}: {error}. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}. {unreadable}".rstrip()) from None


def validated(model: type[Model], data: Any, path: Path, remedy: str, prefix: str = "") -> Model:
    """Data as a record.

    Args:
        model: the schema.
        data: what the file holds.
        path: of the file.
        remedy: what a message tells the user to do.
        prefix: where in the file the data stand, such as `tasks.mmlu.result.`.

    Raises:
        UserError: a field is absent or not as the schema has it; the message names the first.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = (prefix + ".".join(map(str, first["loc"]))).rstrip(".") or "all of it"
        given = "absent" if first["type"] == "missing" else f"given {str(first['input'])[:60]!r}"
        expected = first["msg"].replace("Input should", "must")
        raise UserError(f"{path}: {field}: {given}: {expected[:1].lower()}{expected[1:]}. {remedy}") from None


def read_record(model: type[Model], path: Path) -> Model:
    """Read a file of a run.

    Raises:
        UserError: the file cannot be read, is not JSON or not as the schema has it.
    """
    return validated(model, load_json(path, RUN_AGAIN), path, RUN_AGAIN)
