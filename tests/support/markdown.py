"""Markdown files of the repository as GitHub reads them: links, anchors, and code blocks with their marks."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("gfm-like", {"linkify": False})
FILE_MARK = "file="


@dataclass(frozen=True)
class Block:
    """A code block, fenced or indented.

    `marks` are the words after the language, `line` is the number of its first line in the file, from 1.
    """

    language: str
    marks: tuple[str, ...]
    text: str
    line: int

    @property
    def runs(self) -> bool:
        """Whether the block is marked to be run."""
        return "run" in self.marks

    @property
    def file(self) -> str | None:
        """The file that the block is the content of."""
        return next((mark.removeprefix(FILE_MARK) for mark in self.marks if mark.startswith(FILE_MARK)), None)


def links(file: Path) -> list[str]:
    """The targets of all links and images of a file."""
    return [
        str(token.attrs.get("href") or token.attrs["src"])
        for token in _inline(_tokens(file))
        if token.type in ("link_open", "image")
    ]


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives a file's headings: of equal headings, later ones get numbers."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    tokens = _tokens(file)
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children or () if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def blocks(file: Path) -> list[Block]:
    """The code blocks of a file, in order."""
    found = []
    for token in _tokens(file):
        if token.type in ("fence", "code_block") and token.map:
            language, *marks = token.info.split() or [""]
            found.append(Block(language, tuple(marks), token.content, token.map[0] + 1))
    return found


def _tokens(file: Path) -> list[Token]:
    return PARSER.parse(file.read_text(encoding="utf-8"))


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inline(token.children or [])
