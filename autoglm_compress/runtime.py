"""Where a run computes, with which other processes, and where it shows its progress."""

from dataclasses import dataclass, replace

import torch

from autoglm_compress.processes import ALONE, Processes
from autoglm_compress.progress import Progress


@dataclass(frozen=True)
class Runtime:
    """The device, progress display and processes for a long computation."""

    device: torch.device
    progress: Progress
    processes: Processes = ALONE

    def alone(self) -> "Runtime":
        """The same runtime for work that one process does alone, while others wait for it or do the same."""
        return replace(self, processes=ALONE)
