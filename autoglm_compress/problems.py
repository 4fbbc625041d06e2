"""All problems of a recipe, or of options, reported together."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from autoglm_compress.errors import UserError, suggestion

FieldPath = tuple[str | int, ...]

EXPECTED = {
    "dict_type": "expected a mapping, such as {key: value}",
    "model_type": "expected a mapping, such as {key: value}",
    "list_type": "expected a list, such as [a, b]",
    "tuple_type": "expected a list, such as [a, b]",
    "too_short": "give at least one",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "string_type": "expected text",
    "string_too_short": "expected text",
    "string_pattern_mismatch": "expected letters, digits, '_', '.' and '-', the first a letter or digit",
}
"""The expected value by pydantic's type of error, where pydantic's own words are not clear."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong, at one field."""

    path: FieldPath
    message: str


class RecipeError(UserError):
    """A recipe that cannot run. The message lists every problem with its line."""

    def __init__(self, file: Path, problems: Sequence[Problem], locations: dict[FieldPath, str]) -> None:
        lines = [f"{file}: {len(problems)} problem{'s' * (len(problems) > 1)}:"]
        order = {path: number for number, path in enumerate(locations)}
        for problem in sorted(problems, key=lambda problem: order.get(_located(problem.path, locations), -1)):
            at = _located(problem.path, locations)
            lines.append(f"  {f'{locations[at]}: ' if at else ''}{_spell(problem.path)}: {problem.message}")
        super().__init__("\n".join(lines))


def _located(path: FieldPath, locations: dict[FieldPath, str]) -> FieldPath:
    """The line of a field, or of the innermost enclosing field that has one."""
    while path and path not in locations:
        path = path[:-1]
    return path


def _spell(path: FieldPath) -> str:
    """A field as `--set` takes it: stages count from 1."""
    match path:
        case ("stages", int(number), *rest):
            path = ("stages", str(number + 1), *rest)
    spelled = "".join(f"[{part}]" if isinstance(part, int) or "." in part else f".{part}" for part in path)
    return spelled.removeprefix(".") or "recipe"


def from_validation(error: ValidationError, prefix: FieldPath, model: type[BaseModel]) -> list[Problem]:
    """Problems in the words of this package, from pydantic's."""
    entries = error.errors()
    inner = {tuple(entry["loc"][:-1]) for entry in entries}
    # pydantic also reports a list with wrong items as too short.
    entries = [entry for entry in entries if entry["type"] != "too_short" or tuple(entry["loc"]) not in inner]
    return [_from_entry(entry, prefix, model) for entry in entries]


def _from_entry(entry: Any, prefix: FieldPath, model: type[BaseModel]) -> Problem:
    path = prefix + tuple(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return Problem(path, f"unknown key: {suggestion(str(path[-1]), _fields_at(model, entry['loc'][:-1]))}")
    if entry["type"] == "missing":
        return Problem(path, "missing: give a value")
    message = EXPECTED.get(entry["type"]) or entry["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not entry["loc"]:
        return Problem(path, message)
    given = entry["input"]
    words = re.findall(r"'([^']*)'", entry["msg"]) if entry["type"] == "literal_error" else []
    if isinstance(given, str) and words:
        numbers = re.findall(r"\d+", re.sub(r"'[^']*'", "", entry["msg"]))
        if given in numbers:
            message += f"; write {given} without quotes"
        elif not numbers:
            message = suggestion(given, words)
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {type(given).__name__}"
    return Problem(path, f"given {shown}: {message[:1].lower()}{message[1:]}")


def _fields_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The keys allowed at a place inside a model."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return [field.alias or name for name, field in model.model_fields.items()]
