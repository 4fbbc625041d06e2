"""The rooms of docs/architecture.md are those of the package, and imports go from top to bottom of its table."""

import ast
import re
from pathlib import Path

from support.places import ROOT

PACKAGE = ROOT / "autoglm_compress"
SHARED = "shared"
"""What the table calls the modules beside the rooms, which all may import."""
TABLE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("| room |")[2]


def _listed() -> list[str]:
    """The rooms in the order of the table."""
    return re.findall(r"^\| `(\w+)/`", TABLE, flags=re.MULTILINE)


def _top() -> list[str]:
    """The modules of the first row, which may import everything."""
    return re.findall(r"`(\w+\.py)`", next(line for line in TABLE.splitlines() if line.startswith("| `")))


def _room(parts: tuple[str, ...]) -> str:
    return parts[0] if (PACKAGE / parts[0]).is_dir() else SHARED


def _imported(file: Path) -> set[str]:
    """The rooms that a module imports from, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {_room(tuple(name.split(".")[1:])) for name in names if name.startswith("autoglm_compress.")}
    return found


def test_every_room_is_in_the_table() -> None:
    assert sorted(_listed()) == sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))


def test_imports_go_from_top_to_bottom() -> None:
    floors = {room: number for number, room in enumerate([*_listed(), SHARED])}
    upward = [
        f"{file.relative_to(PACKAGE)} imports {room}"
        for file in PACKAGE.rglob("*.py")
        if str(file.relative_to(PACKAGE)) not in _top()
        for room in _imported(file)
        if floors[room] < floors[_room(file.relative_to(PACKAGE).parts)]
    ]

    assert upward == []
