"""The processes of a run, started by `torchrun` or `accelerate launch`, or a single process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from autoglm_compress.errors import UserError

LONGEST_WAIT = timedelta(days=7)
"""How long a process waits for the first process, which does all unshared work alone."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`; the first has rank 0, runs every stage and writes every checkpoint.

    With several processes, each works on a share of the calibration rows, and the sums over tokens are added up. Every
    process must therefore ask for the same sums and copies, in the same order. With one process, these methods do
    nothing.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that runs the recipe."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.count == 1:
            return value
        told = [value]
        with self._meeting():
            distributed.broadcast_object_list(told, src=0)
        return told[0]

    def share(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This process's rows of batches [rows, ...], dealt out one by one; batches that it has no row of are left out.

        All processes then have equal numbers of rows, or one more, over all batches and nearly in each batch.
        """
        dealt, found = 0, []
        for batch in batches:
            mine = batch[(self.rank - dealt) % self.count :: self.count]
            dealt += len(batch)
            if len(mine):
                found.append(mine)
        return found

    def require_rows(self, rows: int) -> None:
        """Raise UserError if there is not a calibration row for every process."""
        if rows < self.count:
            raise UserError(
                f"calibration: {rows} rows cannot be shared by {self.count} processes: give more samples, or launch "
                "fewer processes."
            )

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace this tensor by the sum of all processes' tensors, which have the same shape."""
        if self.count > 1:
            with self._meeting():
                distributed.all_reduce(tensor)
        return tensor

    def least(self, number: int) -> int:
        """The least of all processes' numbers. No process continues before all have given theirs."""
        if self.count == 1:
            return number
        least = torch.tensor(number)
        with self._meeting():
            distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
        return int(least)

    def put_together(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [n, ...] of all processes, of each its own number n, in the order of the processes."""
        if self.count == 1:
            return rows
        lengths = torch.zeros(self.count, dtype=torch.long)
        lengths[self.rank] = len(rows)
        start, total = int(self.add_up(lengths)[: self.rank].sum()), int(lengths.sum())
        whole = rows.new_zeros(total, *rows.shape[1:])
        whole[start : start + len(rows)] = rows
        return self.add_up(whole)

    def copy_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace this tensor by the first process's, which has the same shape."""
        if self.count > 1:
            with self._meeting():
                distributed.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """End with one line if another process is gone. A traceback here would bury that process's message."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"process {self.rank} stops, as another is gone, which may have said why: {reason}"
            ) from error

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does what is inside; the others when it is done, and find its files."""
        if not self.is_first:
            self.tell(None)
        yield
        if self.is_first:
            self.tell(None)


ALONE = Processes()
"""The one process of a run that nothing launched."""


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Connect to the processes that were launched together. Returns them and this process's device."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE, device
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
