"""The residual stream of every calibration token, between one layer and the next."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from autoglm_compress.checkpoint.writer import write_json


class HiddenStates:
    """Hidden states [batch, length, hidden_size] of a list of token batches, in memory or in mapped files.

    There are two buffers: a layer reads one and writes the other, and only then is the layer noted as done, so a
    layer can be run again, and a walk killed with its buffers in files goes on at the layer it had reached.
    """

    def __init__(self, batches: list[torch.Tensor], hidden_size: int, dtype: torch.dtype, folder: Path | None) -> None:
        self._shapes = [(*batch.shape, hidden_size) for batch in batches]
        self._folder = folder
        elements = sum(batch.numel() for batch in batches) * hidden_size
        if folder is None:
            self._buffers = [torch.empty(elements, dtype=dtype) for _ in (0, 1)]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._buffers = [
                torch.from_file(str(folder / f"hidden-{side}.bin"), shared=True, size=elements, dtype=dtype)
                for side in (0, 1)
            ]
        self.done = self._read_progress()

    def _read_progress(self) -> int:
        """The number of steps (0: nothing, 1: embedded, 1 + n: after n layers) that are complete."""
        if self._folder is None or not (self._folder / "progress.json").exists():
            return 0
        return int(json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))["done"])

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch its states after the last step and the place for those after the next."""
        start = 0
        for shape in self._shapes:
            stop = start + shape[0] * shape[1] * shape[2]
            before, after = self._buffers[self.done % 2], self._buffers[(self.done + 1) % 2]
            yield before[start:stop].view(shape), after[start:stop].view(shape)
            start = stop

    def commit(self) -> None:
        """Note that a step is complete for all batches."""
        self.done += 1
        if self._folder is not None:
            write_json(self._folder / "progress.json", {"done": self.done})
