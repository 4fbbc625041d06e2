"""The calibration rows of a refit: rows to fit to, and rows that decide about the fits."""

from functools import partial

import torch

from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.fitting.descent import PairedStates
from autoglm_compress.forward.state_buffer import StateBuffer
from autoglm_compress.processes import Processes


class FittingRows:
    """This process's share of the rows.

    `batches` are its token ids [rows, length], and `held_out` says which of their rows decide. The choice of deciding
    rows and the number of tokens do not depend on the number of processes.
    """

    def __init__(self, rows: DividedRows, processes: Processes) -> None:
        """All rows, the same in all processes."""
        batches, decide = rows.batches, rows.deciding
        self._deciding = sum(int(chosen.sum()) * batch.shape[1] for batch, chosen in zip(batches, decide, strict=True))
        self._fitted_to = sum(batch.numel() for batch in batches) - self._deciding
        self.batches, self.held_out = processes.share(batches), processes.share(decide)
        numbers = [torch.full((len(batch),), number) for number, batch in enumerate(batches)]
        self._batch_of = [int(mine[0]) for mine in processes.share(numbers)]
        self._steps = len(batches)

    def few(self, inputs: int, held_out: bool) -> bool:
        """Whether all processes have fewer tokens to fit to, or to decide, than a linear has inputs."""
        return (self._deciding if held_out else self._fitted_to) < inputs

    def paired(self, ours: StateBuffer, originals: StateBuffer) -> list[PairedStates]:
        """States of both models, given by batch, for every batch of all: without rows where this process has none."""
        none = self.batches[0][:0]
        nothing = PairedStates(none, lambda: ours[0][:0], lambda: originals[0][:0], self.held_out[0][:0])
        found = [nothing] * self._steps
        for number, batch in enumerate(self._batch_of):
            states = partial(ours.__getitem__, number), partial(originals.__getitem__, number)
            found[batch] = PairedStates(self.batches[number], *states, self.held_out[number])
        return found
