"""The processes of a run, as `torchrun` or `accelerate launch` start them; one where nothing was launched."""

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
"""How long a process waits for the first, which does all alone what is not done together."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`; the first has rank 0, runs every stage and writes every checkpoint.

    What one process does with calibration rows several do with a share of them each, and the sums over tokens are
    added up; so every process must ask for the same sums and copies, in the same order. With one process none of it
    does anything.
    """

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
        with self._meeting():
            distributed.broadcast_object_list(told, src=0)
        return told[0]

    def share(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This process's rows of batches [rows, ...], dealt out one by one; batches that it has no row of are left out.

        So all processes have as many rows, or one more, of all batches and nearly of each.
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
        """Put the sum of the tensors that all processes bring, of one shape, in the place of this one's."""
        if self.count > 1:
            with self._meeting():
                distributed.all_reduce(tensor)
        return tensor

    def least(self, number: int) -> int:
        """The least of the numbers that all processes bring; none goes on before all have brought theirs."""
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
        """Put the first process's tensor in the place of this one's, which has the same shape."""
        if self.count > 1:
            with self._meeting():
                distributed.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """End in one line if another process is gone: a traceback of this one would bury what that one said."""
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
    """Meet the processes that were launched together; returns them and the device that is this one's."""
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
