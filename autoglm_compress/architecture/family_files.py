"""Finding families: the YAML files of this package, of other packages, and those that users name."""

from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from autoglm_compress.architecture.family import Family
from autoglm_compress.errors import UserError

GROUP = "autoglm_compress.families"
"""The group of the entry points whose objects are the paths (str or Path) of families' YAML files."""


BUILT_IN = Path(__file__).parent / "families"
"""The YAML files of this package."""


class UnsupportedArchitectureError(UserError):
    """The model belongs to no known family."""


def read_family(file: Path) -> Family:
    """A family from its YAML file.

    Raises:
        UserError: the file cannot be read, or does not describe a family.
    """
    try:
        return Family.model_validate(_read_data(file, ()))
    except ValidationError as error:
        listed = "\n  ".join(_problem(entry) for entry in error.errors())
        raise UserError(f"{file}: does not describe a family:\n  {listed}") from None


def _read_data(file: Path, above: tuple[Path, ...]) -> Any:
    """The content of a family's YAML, on top of that of the file that it gives as its `base`.

    A base is looked up beside the file, then among this package's. `above` are the files whose base this one is.
    """
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read it: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{file}:{line} not valid YAML: {reason}") from None
    if not isinstance(data, dict) or "base" not in data:
        return data
    base = named_family(str(data.pop("base")), (file.parent, BUILT_IN), f"{file}: base")
    if base in (*above, file.resolve()):
        raise UserError(f"{file}: base: {base.name} is built on this file in turn: leave one of the two out.")
    below = _read_data(base, (*above, file.resolve()))
    return _merged(below, data) if isinstance(below, dict) else data


def _merged(below: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Own values in the place of those below, mapping by mapping; what is below keeps its order."""
    both = {key: _merged(below[key], own[key]) for key in own if _are_mappings(below.get(key), own[key])}
    return below | own | both


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _problem(entry: Any) -> str:
    """One line that says what is wrong with a field."""
    # A YAML field is named by its keys; pydantic adds the branches of a union that it tried.
    place = ".".join(str(part) for part in entry["loc"] if part not in ("str", "int", "constrained-int"))
    if entry["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    if entry["type"] == "missing":
        return f"{place}: missing: give a value"
    if entry["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{place or 'all of it'}: expected a mapping, such as {{key: value}}"
    message = entry["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message


def named_family(name: str, bases: Sequence[Path], option: str) -> Path:
    """The YAML file that an option names, looked up in these folders in order.

    Raises:
        UserError: there is none.
    """
    for base in bases:
        file = (base / Path(name).expanduser()).resolve()
        if file.is_file():
            return file
    raise UserError(f"{option}: no file {name!r} in {' or in '.join(map(str, bases))}.")


@cache
def built_in() -> dict[str, Family]:
    """The families of this package, by architecture."""
    families = [read_family(path) for path in sorted(BUILT_IN.glob("*.yaml"))]
    return {family.architecture: family for family in families}


@cache
def plug_ins() -> tuple[dict[str, Family], tuple[str, ...]]:
    """The families of other packages by architecture, and what is wrong with those that cannot be used."""
    found: dict[str, Family] = {}
    broken: list[str] = []
    for entry in metadata.entry_points(group=GROUP):
        try:
            family = read_family(_file(entry))
            found.setdefault(family.architecture, family)
        except Exception as error:  # another package's code runs here: if it fails, the other families still work
            package = f" of the package {entry.dist.name} {entry.dist.version}" if entry.dist else ""
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            broken.append(f"{entry.name!r} (entry point {entry.value!r}{package}): {reason}")
    return found, tuple(broken)


def _file(entry: metadata.EntryPoint) -> Path:
    given = entry.load()
    if not isinstance(given, str | Path):
        raise TypeError(f"expected the path of a YAML file, found {given!r}")
    return Path(given)


def known_families() -> dict[str, Family]:
    """All families by architecture. Other packages cannot replace a family of this package."""
    return plug_ins()[0] | built_in()


def supported_architectures() -> list[str]:
    """The names, as in `config.json`'s `architectures`, of the families there are."""
    return sorted(known_families())


def family_of(config: dict[str, Any], where: str, given: Family | None = None) -> Family:
    """The family of a model from its `config.json`: the one given, if it describes the model's architecture.

    Raises:
        UnsupportedArchitectureError: the config names no architecture, or one that is not supported.
        UserError: its `model_type`, by which transformers builds the model, is that of another family.
    """
    names = config.get("architectures") or []
    families = known_families() | ({given.architecture: given} if given else {})
    for name in names:
        if name in families:
            _require_model_type(config, families[name], where)
            return families[name]
    found = ", ".join(names) if names else f"none given (model_type {config.get('model_type')!r})"
    of_type = [family for family in families.values() if family.model_type == config.get("model_type")]
    if names and of_type:
        raise UserError(
            f"{where}: {found} does not predict next tokens: it is a part of {of_type[0].architecture} or another "
            f"model built on it. Give the whole model, saved as {of_type[0].architecture}."
        )
    message = f"{where}: unsupported architecture: {found}.\nSupported: {', '.join(sorted(families))}."
    if broken := plug_ins()[1]:
        message += "\nNot usable, of other packages: " + "; ".join(broken)
    raise UnsupportedArchitectureError(message)


def family_within(architectures: Sequence[str]) -> Family | None:
    """The family whose model is a part of a larger one, by the larger one's architectures."""
    for family in known_families().values():
        if family.within is not None and set(family.within.architectures) & set(architectures):
            return family
    return None


def require_used(given: Family | None, found: Family, option: str, where: str) -> None:
    """Raise UserError if an option gives a family for a model, whose config is `where`, that is of another."""
    if given is not None and found is not given:
        raise UserError(
            f"{option}: describes {given.architecture}, and {where} says {found.architecture}: leave {option} out, or "
            "give the model's family."
        )


def _require_model_type(config: dict[str, Any], family: Family, where: str) -> None:
    given = config.get("model_type")
    if given != family.model_type:
        raise UserError(
            f"{where}: architectures names {family.architecture}, which has model_type {family.model_type}, but "
            f"model_type is {given!r}, and transformers would build that model. Correct the field that is wrong."
        )
