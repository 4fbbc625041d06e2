"""The text source `python-docs`: the running interpreter's own documentation.

Two kinds of documents, both read from the installed standard library without importing the modules described:
the language reference topics behind `help()` (`pydoc_data.topics`), and one document per module, made of the
docstrings of the module, its classes and its functions. Nothing is downloaded and nothing is shipped.

Every document belongs to one split for good: a hash of its topic or top-level module name decides.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["calibration", "held-out", "fitted", "deciding"]
"""A set of documents. `calibration` and `held-out` are disjoint; held-out documents are for measuring. `fitted` and
`deciding` divide `calibration`: stages are fitted to the former, the latter decide about the fits.
"""

SKIPPED_PARTS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "_bundled",
        "encodings",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
HELD_OUT_PERCENT, DECIDING_PERCENT = 10, 10
PARTS: dict[Split, frozenset[Split]] = {
    "calibration": frozenset({"fitted", "deciding"}),
    "held-out": frozenset({"held-out"}),
    "fitted": frozenset({"fitted"}),
    "deciding": frozenset({"deciding"}),
}
STARTS_WITH_DOCSTRING = re.compile(rb"(\s*#.*\n)*\s*[rR]?(\"\"\"|\'\'\')\s*\w")


@dataclass(frozen=True)
class Title:
    """A document by the name of its topic, or of its module and where that is."""

    name: str
    path: Path | None = None


def split_of(name: str) -> Split:
    """Return the split of a topic, or of a module by its top-level name: held-out, deciding or fitted."""
    return split_of_text(name.partition(".")[0])


def split_of_text(text: str) -> Split:
    """Return the split that a hash of a text puts it in for good: held-out, deciding or fitted."""
    place = zlib.crc32(text.encode()) % 100
    if place < HELD_OUT_PERCENT:
        return "held-out"
    return "deciding" if place < HELD_OUT_PERCENT + DECIDING_PERCENT else "fitted"


def module_files(stdlib: Path | None = None) -> dict[str, Path]:
    """Map the dotted names of the standard library's pure-Python modules to their source files, sorted by name."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - SKIPPED_PARTS
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_PARTS.intersection(parts) or not all(part.isidentifier() for part in parts):
                continue
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts:
                found[".".join(parts)] = path
    return dict(sorted(found.items()))


def parse_module(path: Path) -> ast.Module | None:
    """Parse a source file, or return None where it is no valid Python source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the classes and functions directly in a module or class, those under `if` and `try` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from definitions(child)


def heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return `class X(Base)` or `def f(args)` for a definition."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def module_document(name: str, tree: ast.Module) -> str:
    """Return the docstrings of one module as a document, or an empty string where it has none."""
    docstring = ast.get_docstring(tree)
    sections = [docstring] if docstring else []
    for node in definitions(tree):
        sections.extend(_sections(node, indent=0))
    return "\n\n".join([f"module {name}", *sections]) + "\n" if sections else ""


def documents(split: Split) -> list[str]:
    """Return the documents of one split, in a fixed order: language topics first, then modules, each by name.

    Args:
        split: "calibration", a part of it, or "held-out" for the tenth of topics and modules kept back for measuring.

    Raises:
        ValueError: if the split is unknown.
    """
    return [document(title) for title in titles(split)]


def titles(split: Split) -> list[Title]:
    """Return the documents of one split by their titles, in the order of `documents`, without making them all.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in PARTS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(PARTS)}")
    found = [Title(name) for name in sorted(_topics())]
    found += [Title(name, path) for name, path in module_files().items()]
    return [title for title in found if split_of(title.name) in PARTS[split] and _has_text(title)]


@cache
def document(title: Title) -> str:
    """Return the text of a document, or an empty string where there is none."""
    if title.path is None:
        text = _topics()[title.name].strip()
        return text + "\n" if text else ""
    tree = parse_module(title.path)
    return module_document(title.name, tree) if tree else ""


@cache
def _has_text(title: Title) -> bool:
    """Whether a document is not empty; of most modules the first lines tell."""
    if title.path is not None and STARTS_WITH_DOCSTRING.match(title.path.read_bytes()):
        return True
    return bool(document(title))


def _topics() -> dict[str, str]:
    """Return the language reference topics, none where the interpreter was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def _sections(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, indent: int) -> list[str]:
    """Return the heading and docstring of a definition, then those of a class's members; nothing if undocumented."""
    docstring = ast.get_docstring(node) or ""
    members: list[str] = []
    if isinstance(node, ast.ClassDef):
        for member in definitions(node):
            members.extend(_sections(member, indent + 4))
    if not docstring and not members:
        return []
    margin = " " * indent
    lines = [margin + heading(node)]
    lines += [f"{margin}    {line}" if line.strip() else "" for line in docstring.splitlines()]
    return ["\n".join(lines), *members]
