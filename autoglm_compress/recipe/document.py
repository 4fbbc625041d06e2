"""A YAML file as plain data together with where each field stands, so that errors can name the line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autoglm_compress.errors import UserError
from autoglm_compress.recipe.problems import FieldPath


@dataclass
class Document:
    """The data of a recipe and, by the path of each field, its place (`line 7`, or `base.yaml line 7`)."""

    data: dict[str, Any]
    locations: dict[FieldPath, str] = field(default_factory=dict)


def read_document(file: Path, seen: tuple[Path, ...] = ()) -> Document:
    """Read a recipe file and, underneath it, the one its `base:` names.

    Mappings are merged key by key; anything else, the list of stages too, replaces what the base says.

    Raises:
        UserError: a file is missing or not YAML, is not a mapping, or is its own base.
    """
    file = file.resolve()
    if file in seen:
        raise UserError(f"{file}: base: a recipe cannot be its own base: {' -> '.join(map(str, (*seen, file)))}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the recipe: {error}") from None
    try:
        data = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{file}:{line} not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a mapping with name, model and stages, found {type(data).__name__}.")
    own = Document(data)
    _locate(root, (), f"{file.name} line" if seen else "line", own.locations)
    base = data.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{file}: base: expected the name of a recipe file, found {base!r}.")
    below = read_document(file.parent / base, (*seen, file))
    replaced = {path for path, value in _leaves(own.data) if not isinstance(value, dict)}
    kept = {path: at for path, at in below.locations.items() if not any(path[: len(r)] == r for r in replaced)}
    return Document(_merge(below.data, own.data), kept | own.locations)


def _locate(node: yaml.Node, path: FieldPath, prefix: str, locations: dict[FieldPath, str]) -> None:
    locations[path] = f"{prefix} {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _locate(value, (*path, key.value), prefix, locations)
            locations[(*path, key.value)] = f"{prefix} {key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _locate(value, (*path, number), prefix, locations)


def _leaves(data: dict[str, Any], path: FieldPath = ()) -> list[tuple[FieldPath, Any]]:
    found: list[tuple[FieldPath, Any]] = []
    for key, value in data.items():
        found.append(((*path, key), value))
        if isinstance(value, dict):
            found += _leaves(value, (*path, key))
    return found


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def override(document: Document, assignment: str) -> None:
    """Apply one `--set KEY=VALUE`: a dotted path, where a stage goes by its name or number, and a YAML value.

    Raises:
        UserError: it is not of that form, or names a stage that the recipe does not have.
    """
    key, separator, value = assignment.partition("=")
    if not separator or not key:
        raise UserError(f"--set {assignment}: expected KEY=VALUE, such as model.source=./my-model.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not valid YAML: {error}") from None
    target: Any = document.data
    path: FieldPath = ()
    *parents, last = key.split(".")
    for part in parents:
        step = _stage_number(target, part, assignment) if isinstance(target, list) else part
        path = (*path, step)
        target = target[step] if isinstance(target, list) else target.setdefault(step, {})
        if not isinstance(target, dict | list):
            raise UserError(f"--set {assignment}: {part} holds a value, not further keys.")
    if isinstance(target, list):
        raise UserError(f"--set {assignment}: give the option of the stage too, such as {key}.OPTION=VALUE.")
    target[last] = parsed
    document.locations[(*path, last)] = f"--set {key}"


def _stage_number(stages: list[Any], part: str, assignment: str) -> int:
    labels = [str(s.get("name") or s.get("stage")) if isinstance(s, dict) else "" for s in stages]
    if part in labels:
        return labels.index(part)
    if part.isdigit() and 1 <= int(part) <= len(stages):
        return int(part) - 1
    raise UserError(f"--set {assignment}: no stage {part!r}; there are {', '.join(labels)}.")
