"""The processes of a run, as `torchrun` or `accelerate launch` start them; one where nothing was launched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from autoglm_compress.errors import UserError

LONGEST_WAIT = timedelta(days=7)
"""How long a process waits for the first, which does all alone what is not done together."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`; the first has rank 0, runs every stage and writes every file."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that runs the recipe."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        if self.count == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, src=0)
        return told[0]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what is inside; the others when it is done, and find its files."""
        if not self.is_first:
            self.tell(None)
        yield
        if self.is_first:
            self.tell(None)


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the processes that were launched together; returns them and the device that is this one's."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    return Processes(distributed.get_rank(), count), device


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
