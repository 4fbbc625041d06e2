"""Memory that a person allows, and what a process takes of it before any work."""

import re

from autoglm_compress.errors import UserError

PROCESS_BYTES = 500 << 20
"""Resident memory of Python with torch, transformers, lm-eval, a tokenizer and texts loaded, of drawing figures, and of
small freed blocks that lie between used ones, with a build of torch for CPUs."""


def read_bytes(text: str) -> int | None:
    """A size such as `8GB`, `7.5 GiB` or `900MB` in bytes. None if the text is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(i?)B", text.strip(), re.IGNORECASE)
    if not found:
        return None
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (2 if unit in "mM" else 3))


def bytes_of(text: str) -> int:
    """A limit as the command line gives it, in bytes.

    Raises:
        UserError: the text is not a size.
    """
    found = read_bytes(text)
    if found is None:
        raise UserError(f"--memory-limit: given {text!r}: expected a size such as 8GB, 7.5GiB or 900MB.")
    return found


def limit_in_bytes(memory_limit: str | int | None) -> int | None:
    """A limit as Python programs and the command line give it: a size, bytes, or none.

    Raises:
        UserError: the text is not a size.
    """
    return bytes_of(memory_limit) if isinstance(memory_limit, str) else memory_limit
