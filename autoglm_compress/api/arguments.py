"""Types and checks that the functions share."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from autoglm_compress.architecture import Family, named_family, read_family
from autoglm_compress.progress import Progress

Place = str | Path
"""A file or a folder."""
Device = Literal["auto", "cpu", "cuda"]


def shown_progress(shown: bool) -> Progress:
    """Progress on the terminal, or nowhere."""
    return Progress(Console(quiet=not shown))


def named_family_in(file: Place | None) -> Family | None:
    """The family that a file describes, if one is given.

    Raises:
        UserError: there is no such file, or it describes none.
    """
    return None if file is None else read_family(named_family(str(file), [Path.cwd()], "--family"))
