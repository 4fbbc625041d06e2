"""The recipes that come with the package, and how a recipe that a user names is found."""

import re
from collections.abc import Iterable
from pathlib import Path

from autoglm_compress.errors import UserError, suggestion

SUMMARY = re.compile(r"# (.+?)\.\s")
"""The first sentence of the comment that a recipe begins with."""


def bundled_folder() -> Path:
    """The folder that holds `recipes`, and all that they name beside it: in the package, or the root of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "bundled"
    return installed if installed.is_dir() else package.parent


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {
        file.stem: file for file in sorted((bundled_folder() / "recipes").glob("*.yaml"), key=lambda file: file.stem)
    }


def summary(file: Path) -> str:
    """The first sentence of a bundled recipe's comment."""
    found = SUMMARY.match(file.read_text(encoding="utf-8"))
    return found[1] if found else ""


def bundled_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package.

    Raises:
        UserError: there is none of that name.
    """
    known = bundled_recipes()
    _require_name(name, known)
    if name not in known:
        raise UserError(f"{name}: no recipe of the package has this name: {suggestion(name, known)}.")
    return known[name]


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: text is the name of one of the package's or else a path, and a Path is a path.

    A name wins over a file of the same name; `./NAME` means the file.

    Raises:
        UserError: there is no such recipe or file.
    """
    known = bundled_recipes()
    if isinstance(recipe, str):
        _require_name(recipe, known)
        if recipe in known:
            return known[recipe]
    file = Path(recipe)
    if not file.exists():
        hint = suggestion(file.stem, known)
        raise UserError(f"{file}: cannot read it: No such file, and no recipe of the package has this name: {hint}.")
    return file


def _require_name(name: str, known: Iterable[str]) -> None:
    if not name:
        raise UserError(f"the name of the recipe is empty: {suggestion(name, known)}.")


def hides_file(recipe: str) -> bool:
    """Whether a bundled recipe hides a file of the same name."""
    return recipe in bundled_recipes() and Path(recipe).is_file()
