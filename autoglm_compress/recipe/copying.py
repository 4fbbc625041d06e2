"""Copying a bundled recipe, with all files that it names, for a user to change."""

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoglm_compress.atomic import appearing
from autoglm_compress.calibration.text import media_chats
from autoglm_compress.errors import UserError
from autoglm_compress.recipe.document import read_document
from autoglm_compress.shipped import bundled_folder, bundled_recipe


def copy_recipe(name: str, target: Path) -> tuple[Path, list[Path]]:
    """Copy a recipe, its bases, and the texts, questions and models beside them that they name.

    Images and sounds of rows go along.

    The copies lie as far from each other as the originals, so that the relative paths in them stay right. What is there
    already is left if it is the same.

    Args:
        name: of a recipe that comes with the package.
        target: the folder to copy to, which need not exist.

    Returns:
        The copy of the recipe, and all files that belong to it there.

    Raises:
        UserError: there is no such recipe, a file with other content exists already, or a file cannot be written.
    """
    recipe, root = bundled_recipe(name).resolve(), bundled_folder().resolve()
    copies = {file: target / file.relative_to(root) for file in sorted(_belonging(recipe, root))}
    try:
        missing = {file: copy for file, copy in copies.items() if not copy.exists()}
        for file, copy in copies.items():
            if file not in missing and not filecmp.cmp(file, copy, shallow=False):
                raise UserError(f"--copy: {copy} exists with other content. Give another folder, or rename that file.")
        for file, copy in missing.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with appearing(copy) as temporary:
                shutil.copyfile(file, temporary)
    except OSError as error:
        raise UserError(f"--copy: cannot write to {error.filename or target}: {error.strerror or error}.") from None
    return copies[recipe], list(copies.values())


def _belonging(recipe: Path, root: Path) -> set[Path]:
    """A recipe's own file, those of its bases, and all below `root` to which a text in them leads."""
    document = read_document(recipe)
    found = set(document.files)
    for text in _texts(document.data):
        for folder in {file.parent for file in document.files}:
            path = (folder / text).resolve()
            if root in path.parents and path.is_dir():
                found.update(file for file in path.rglob("*") if file.is_file())
            elif root in path.parents and path.is_file():
                found.add(path)
                found.update(file.resolve() for chat in media_chats(path) for file in chat.files)
    return found


def _texts(data: Any) -> Iterator[str]:
    """Every text in plain data, keys among them."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)
