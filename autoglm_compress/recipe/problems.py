"""Everything that is wrong with a recipe, said at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from autoglm_compress.errors import UserError

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong, at one field."""

    path: FieldPath
    message: str


class RecipeError(UserError):
    """A recipe that cannot run, with every problem found, each with its line."""

    def __init__(self, file: Path, problems: Sequence[Problem], locations: dict[FieldPath, str]) -> None:
        lines = [f"{file}: {len(problems)} problem{'s' * (len(problems) > 1)}:"]
        for problem in problems:
            lines.append(f"  {_location(problem.path, locations)}{_spell(problem.path)}: {problem.message}")
        super().__init__("\n".join(lines))


def _location(path: FieldPath, locations: dict[FieldPath, str]) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in locations:
            return f"{locations[path[:length]]}: "
    return ""


def _spell(path: FieldPath) -> str:
    spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return spelled.removeprefix(".") or "recipe"


def suggestion(given: str, allowed: Iterable[str]) -> str:
    """Words that name the nearest valid spelling and all that is allowed."""
    names = sorted(allowed)
    near = get_close_matches(given, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"Allowed: {', '.join(names)}"


def from_validation(error: ValidationError, prefix: FieldPath, model: type[BaseModel]) -> list[Problem]:
    """Problems in the words of this package, from pydantic's."""
    return [_from_entry(entry, prefix, model) for entry in error.errors()]


def _from_entry(entry: Any, prefix: FieldPath, model: type[BaseModel]) -> Problem:
    path = prefix + tuple(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return Problem(path, f"unknown key: {suggestion(str(path[-1]), _fields_at(model, entry['loc'][:-1]))}")
    if entry["type"] == "missing":
        return Problem(path, "missing: give a value")
    message = entry["msg"].removeprefix("Value error, ")
    if not entry["loc"]:
        return Problem(path, message)
    given = entry["input"]
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    return Problem(path, f"given {shown}: {message[:1].lower()}{message[1:]}")


def _fields_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The keys allowed at a place inside a model."""
    for part in path:
        model = model.model_fields[part].annotation
    return [field.alias or name for name, field in model.model_fields.items()]
