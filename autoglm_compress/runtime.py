"""Where a run computes, with which other processes, and where it shows its progress."""

from dataclasses import dataclass, replace

import torch

from autoglm_compress.processes import ALONE, Processes
from autoglm_compress.progress import Progress


@dataclass(frozen=True)
class Runtime:
    """What every long computation needs to know of the machine and of the processes it shares the work with."""

    device: torch.device
    progress: Progress
    processes: Processes = ALONE

    def alone(self) -> "Runtime":
        """The same for work that one process does by itself, while others may wait for it or do the same."""
        return replace(self, processes=ALONE)
