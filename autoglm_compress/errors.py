"""The exceptions that end a command in one message, and lists of names in messages."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: shown as one message, exit code 2, no traceback."""


class PlanError(ValueError):
    """A stage cannot work on the shape it is given; `option` names the option to change."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Terminated(BaseException):
    """The system asked the process to end (SIGTERM)."""


def in_one_line(error: Exception) -> str:
    """The kind and the words of another library's exception, for the middle of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")


def listed(names: Collection[str], most: int = 5) -> str:
    """Names in order, the first few if there are many."""
    shown = ", ".join(sorted(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def suggestion(given: str, allowed: Iterable[str]) -> str:
    """A hint with the closest valid spelling and all allowed names."""
    names = sorted(allowed)
    near = get_close_matches(given, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"Allowed: {', '.join(names)}"


def nearest(given: str, names: Collection[str]) -> str:
    """A hint with the names that are spelled most like the given one, or with a few names if none is."""
    near = get_close_matches(given, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {listed(names)}."
