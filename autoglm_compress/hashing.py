"""Hashes of files, texts and plain data."""

import hashlib
import json
from pathlib import Path
from typing import Any

LENGTH = 20
"""Hexadecimal digits of a short hash, unless told otherwise."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(text: str, length: int = LENGTH) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def key_of(data: Any) -> str:
    """A short hash of plain data; the order of the fields of a mapping does not count."""
    return hash_of(json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
