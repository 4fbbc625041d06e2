"""Calibration text: documents from a file or a built-in source, split into calibration and held-out for good."""

import json
import platform
import random
import re
from collections.abc import Iterator
from pathlib import Path

from autoglm_compress.calibration import python_docs
from autoglm_compress.calibration.chat import EXPECTED, Chat, read_chat
from autoglm_compress.calibration.python_docs import PARTS, Split, split_of_text
from autoglm_compress.errors import UserError
from autoglm_compress.hashing import key_of, sha256

PYTHON_DOCS = "python-docs"
PARAGRAPH_CHARACTERS = 2000
LONG_PARAGRAPH = 10
MOST = f".{{1,{PARAGRAPH_CHARACTERS}}}"
PART = re.compile(rf"{MOST}(?:\n|\Z)|{MOST}\s|{MOST}", re.DOTALL)
"""A chunk of text: up to the end of a line, in a long line up to the end of a word, otherwise cut anywhere."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's complete surrogate pairs are already read as characters

Document = str | Chat
"""Plain text, or a chat for the tokenizer's chat template."""


def locate(source: str, bases: list[Path], option: str) -> Path | None:
    """The file a source names, looked up beside the recipe, then in the working directory; None if built in.

    Raises:
        UserError: there is no such file, or it is of an unknown kind.
    """
    if source == PYTHON_DOCS:
        return None
    for base in bases:
        path = (base / Path(source).expanduser()).resolve()
        if path.is_file():
            if path.suffix not in (".jsonl", ".txt", ".md"):
                raise UserError(f"{option}: {path}: expected a .jsonl, .txt or .md file.")
            return path
    looked = " or in ".join(str(base) for base in bases)
    raise UserError(f"{option}: no file {source!r} in {looked}. Give a .jsonl or .txt file, or {PYTHON_DOCS}.")


def locate_rows(source: str, bases: list[Path], option: str) -> Path:
    """The .jsonl file that an option names, looked up as `locate` does.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    path = locate(source, bases, option)
    if path is None or path.suffix != ".jsonl":
        raise UserError(f"{option}: {source}: expected a .jsonl file of chats whose last message is the answer.")
    return path


def text_key(path: Path | None) -> str:
    """The key of a text: a file's, with those of the images and sounds that it names, or of the interpreter's own
    documentation.
    """
    if path is None:
        return f"python {platform.python_version()}"
    files = sorted({file for chat in media_chats(path) for file in chat.files})
    return key_of([sha256(path), [sha256(file) for file in files]]) if files else sha256(path)


def media_chats(path: Path) -> list[Chat]:
    """The chats of a file, whatever their split, that have images or sounds."""
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else []
    return [row for row in rows if isinstance(row, Chat) and row.media]


def documents(path: Path | None, split: Split) -> list[Document]:
    """The documents of one split of a file, or of the built-in source if there is no file.

    Of a file, a hash of its text decides which split a document is in; a tenth is held out, and a tenth decides.

    Raises:
        UserError: the file is not UTF-8, or a line of it has neither `text` nor `messages` as chat templates take them,
            or half a character.
    """
    if path is None:
        return list(python_docs.documents(split))
    found = _read_jsonl(path) if path.suffix == ".jsonl" else _read_plain(path)
    return [document for document in found if is_in(document, split)]


def shuffled(path: Path | None, split: Split, seed: int) -> Iterator[Document]:
    """The documents of one split, as `documents` gives them, in an order that the seed decides.

    Documents of the built-in source are made one at a time, because most callers need few of them.
    """
    shuffle = random.Random(seed).shuffle
    if path is None:
        titles = python_docs.titles(split)
        shuffle(titles)
        return map(python_docs.document, titles)
    found = documents(path, split)
    shuffle(found)
    return iter(found)


def is_in(document: Document, split: Split) -> bool:
    """Whether a document is in one split of its file."""
    return _split_of(document) in PARTS[split]


def _split_of(document: Document) -> Split:
    text = document if isinstance(document, str) else json.dumps(document.messages, ensure_ascii=False)
    return split_of_text(text)


def numbered_rows(path: Path) -> Iterator[tuple[str, Document]]:
    """The rows of a .jsonl file, each after its `file:line`.

    Raises:
        UserError: as `documents` does.
    """
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _row(line, where, path.parent)


def _read_jsonl(path: Path) -> list[Document]:
    return [document for _, document in numbered_rows(path)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None


def _row(line: str, where: str, folder: Path) -> Document:
    try:
        row = json.loads(line)
        half = LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if half:
        raise UserError(
            f"{where}: \\u{ord(half[0]):x} is half of a surrogate pair, and no character: complete the pair."
        )
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and "messages" in row:
        return read_chat(row, where, folder)
    raise UserError(f"{where}: {EXPECTED}.")


def _read_plain(path: Path) -> list[Document]:
    """Paragraphs joined to documents of about two thousand characters, long ones cut where lines or words end.

    A document is long with ten times as many characters. In a text without paragraphs, one with more than two thousand
    is long.
    """
    text = _read(path)
    joined, found = "", []
    for paragraph in text.split("\n\n"):
        joined += paragraph + "\n\n"
        if len(joined) >= PARAGRAPH_CHARACTERS:
            found.append(joined)
            joined = ""
    found += [joined] if joined.strip() else []
    longest = PARAGRAPH_CHARACTERS * (LONG_PARAGRAPH if "\n\n" in text.strip() else 1)
    return [part for document in found for part in ([document] if len(document) <= longest else _parts(document))]


def _parts(document: str) -> list[str]:
    return [part for part in PART.findall(document) if part.strip()]
