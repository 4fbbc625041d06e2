"""Options that several commands have."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Device(str, Enum):
    """Where layers run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


FamilyFile = Annotated[
    str | None,
    typer.Option("--family", metavar="FILE", help="A YAML that describes the model's family. \\[default: a known one]"),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Refuse what may need more memory, such as 8GB. \\[default: none]"),
]


def family_in(file: str | None) -> Any:
    """The family that a file describes, if one is given."""
    from autoglm_compress.architecture import named_family, read_family

    return None if file is None else read_family(named_family(file, [Path.cwd()], "--family"))
