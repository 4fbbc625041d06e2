"""A YAML file as plain data with the line of each field, so that errors can name it."""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autoglm_compress.errors import UserError
from autoglm_compress.problems import FieldPath
from autoglm_compress.shipped import bundled_recipes

TEXT_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
WHOLE = {("calibration", "source")}
"""Mappings that count as one value, because shares only have a meaning together."""


@dataclass
class Document:
    """The data of a recipe and, by the path of each field, its place (`line 7`, or `base.yaml line 7`).

    `files` are those it was read from: its own, its base's, and so on.
    """

    data: dict[str, Any]
    locations: dict[FieldPath, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text and unique. Plain YAML would ignore one of two equal keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        given = set()
        for key, _ in node.value:
            if key.tag not in TEXT_KEYS:
                raise yaml.MarkedYAMLError(problem="a key must be text: put it in quotes", problem_mark=key.start_mark)
            if key.value in given:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            given.add(key.value)
        return node


def read_document(file: Path, seen: tuple[Path, ...] = ()) -> Document:
    """Read a recipe file and, underneath it, the one its `base:` names: one of the package's, or a file beside it.

    Mappings are merged key by key. Everything else, including the list of stages and the fields in WHOLE, replaces the
    base's value.

    Raises:
        UserError: a file is missing or not YAML, is not a mapping, or is its own base.
    """
    file = file.resolve()
    if file in seen:
        raise UserError(f"{file}: base: a recipe cannot be its own base: {' -> '.join(map(str, (*seen, file)))}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{f'{seen[-1]}: base: ' if seen else ''}{file}: cannot read it: {reason}") from None
    data, locations = _parse(text, str(file), f"{file.name} line" if seen else "line")
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{file}: expected a mapping with name, model and stages, found {found}.")
    base = data.pop("base", None)
    if base is None:
        return Document(data, locations, (file,))
    if not isinstance(base, str):
        raise UserError(f"{file}: base: expected the name or the file of a recipe, found {base!r}.")
    below = read_document(bundled_recipes().get(base) or file.parent / base, (*seen, file))
    replaced = {path for path, value in _leaves(data) if not isinstance(value, dict) or path in WHOLE}
    kept = {path: at for path, at in below.locations.items() if not any(path[: len(r)] == r for r in replaced)}
    return Document(_merge(below.data, data), kept | locations, (file, *below.files))


def _parse(text: str, where: str, prefix: str) -> tuple[Any, dict[FieldPath, str]]:
    """The data of some YAML, with its lines.

    Raises:
        UserError: it is not YAML.
    """
    locations: dict[FieldPath, str] = {}
    try:
        data = yaml.load(text, _Loader)
        _locate(yaml.compose(text, _Loader), (), prefix, locations)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}:{line} not valid YAML: {reason}") from None
    except (ValueError, RecursionError) as error:  # 2020-99-99 parses as a date; a list may contain itself
        raise UserError(f"{where}: not valid YAML: {error}") from None
    return data, locations


def _locate(node: yaml.Node | None, path: FieldPath, prefix: str, locations: dict[FieldPath, str]) -> None:
    if node is None:
        return
    locations[path] = f"{prefix} {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*path, key.value)
            _locate(value, at, prefix, locations)
            locations[at] = f"{prefix} {key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, (*path, number), prefix, locations)


def _leaves(data: dict[str, Any], path: FieldPath = ()) -> list[tuple[FieldPath, Any]]:
    found: list[tuple[FieldPath, Any]] = []
    for key, value in data.items():
        found.append(((*path, key), value))
        if isinstance(value, dict) and (*path, key) not in WHOLE:
            found += _leaves(value, (*path, key))
    return found


def _merge(below: dict[str, Any], above: dict[str, Any], path: FieldPath = ()) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        at = (*path, key)
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and at not in WHOLE
        merged[key] = _merge(merged[key], value, at) if both else value
    return merged


def override(document: Document, assignment: str) -> None:
    """Apply one `--set KEY=VALUE`: a dotted path, in which a stage has its name or number, and a YAML value.

    Raises:
        UserError: it does not have that form, or names a stage that the recipe does not have.
    """
    key, separator, value = assignment.partition("=")
    if not separator:
        raise UserError(f"--set {assignment}: expected KEY=VALUE, such as model.source=./my-model.")
    data, _ = _parse(value, f"--set {assignment}", "")
    assign(document, key, data, assignment)


def assign(document: Document, key: str, value: Any, assignment: str) -> None:
    """Set a field by its dotted path; messages call it `--set` and the assignment.

    Raises:
        UserError: the path is none, or names a stage that the recipe does not have.
    """
    if not all(key.split(".")):
        raise UserError(f"--set {assignment}: expected KEY=VALUE, such as model.source=./my-model.")
    target: Any = document.data
    path: FieldPath = ()
    *parents, last = key.split(".")
    for part in parents:
        step = _step(target, path, part, assignment)
        path = (*path, step)
        target = target.setdefault(step, {}) if isinstance(step, str) else target[step]
        if not isinstance(target, dict | list):
            raise UserError(f"--set {assignment}: {part} holds a value, not further keys.")
    path = (*path, _step(target, path, last, assignment))
    if isinstance(target, list):
        raise UserError(f"--set {assignment}: give the option of the stage too, such as {key}.OPTION=VALUE.")
    target[last] = deepcopy(value)  # a later assignment may change it
    document.locations = {at: place for at, place in document.locations.items() if at[: len(path)] != path}
    document.locations[path] = f"--set {key}"


def _step(target: Any, path: FieldPath, part: str, assignment: str) -> str | int:
    """The key or index that one part of a dotted path means."""
    if not isinstance(target, list):
        return part
    if path != ("stages",):
        raise UserError(f"--set {assignment}: {path[-1]} is a list: give all of it, such as {path[-1]}=[0, 1].")
    labels = [str(s.get("name") or s.get("stage")) if isinstance(s, dict) else "" for s in target]
    if part in labels:
        return labels.index(part)
    if part.isdecimal() and 1 <= int(part) <= len(target):
        return int(part) - 1
    raise UserError(f"--set {assignment}: no stage {part!r}; there are {', '.join(labels)}.")
