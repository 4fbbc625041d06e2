"""Types and checks that the functions share."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from autoglm_compress.progress import Progress

Place = str | Path
"""A file or a folder."""
Device = Literal["auto", "cpu", "cuda"]


def shown_progress(shown: bool) -> Progress:
    """Progress on the terminal, or nowhere."""
    return Progress(Console(quiet=not shown))
