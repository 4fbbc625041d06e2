"""Work on the CPU whose progress nobody sees."""

import io

import torch
from rich.console import Console

from autoglm_compress.progress import Progress
from autoglm_compress.runtime import Runtime

CPU = torch.device("cpu")


def quiet() -> Runtime:
    """The CPU, one process, and lines of progress that are thrown away."""
    return Runtime(CPU, Progress(Console(file=io.StringIO(), width=1000)))
