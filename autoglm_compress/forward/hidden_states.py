"""The residual stream of every calibration token, between one layer and the next."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.forward.features import embedded
from autoglm_compress.forward.state_buffer import StateBuffer
from autoglm_compress.processes import ALONE, Processes


def buffer_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes, at most, of the two buffers of so many tokens, which are fp32 unless a model runs in 16 bits."""
    return 2 * torch.float32.itemsize * tokens * shape.hidden_size


class HiddenStates:
    """Hidden states [batch, length, hidden_size] of a list of token batches, in memory or in mapped files.

    There are two buffers. A layer reads one and writes the other, and only then counts as done. A layer can therefore
    run again, and a killed walk with its buffers in files continues at the layer it had reached.

    Where several processes walk, each has its share of the rows, and files of its own. They continue together, at the
    step that all of them had reached, and only under the same number of processes.
    """

    def __init__(
        self,
        batches: list[torch.Tensor],
        hidden_size: int,
        dtype: torch.dtype,
        folder: Path | None,
        processes: Processes = ALONE,
    ) -> None:
        self._shapes = [(*batch.shape, hidden_size) for batch in batches]
        self._dtype = dtype
        self._processes = processes
        if folder is not None and not processes.is_first:
            folder = folder / f"process-{processes.rank}"
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._buffers = [self._allocate(f"hidden-{side}.bin") for side in (0, 1)]
        self.done = self._read_progress()
        self._meet()

    def _allocate(self, name: str) -> StateBuffer:
        return StateBuffer(self._shapes, self._dtype, None if self.folder is None else self.folder / name)

    def _read_progress(self) -> int:
        """The number of steps (0: nothing, 1: embedded, 1 + n: after n layers) that are complete."""
        if self.folder is None or not (self.folder / "progress.json").exists():
            return 0
        found = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        if found["states"] == self._description():
            return int(found["done"])
        # Another device computes in another dtype, and another number of processes shares rows differently. Also, the
        # existing files are about to be overwritten.
        (self.folder / "progress.json").unlink()
        return 0

    def _write_progress(self) -> None:
        if self.folder is not None:
            write_json(self.folder / "progress.json", {"done": self.done, "states": self._description()})

    def _description(self) -> list[Any]:
        shared = [self._processes.rank, self._processes.count] if self._processes.count > 1 else []
        return [str(self._dtype), [list(shape) for shape in self._shapes], *shared]

    def _meet(self) -> None:
        """Go back to the step that all processes have reached. A process that is ahead has it in its other buffer.

        No process is more than one step ahead: each begins a step only after all have finished the one before.
        """
        if self._processes.count > 1:
            self.done = self._processes.least(self.done)
            self._write_progress()
            self._processes.least(self.done)

    @property
    def layers_done(self) -> int:
        """The number of layers that all batches went through."""
        return max(self.done - 1, 0)

    @property
    def before(self) -> StateBuffer:
        """The states of each batch after the last step."""
        return self._buffers[self.done % 2]

    @property
    def after(self) -> StateBuffer:
        """For each batch the place for its states after the next step."""
        return self._buffers[(self.done + 1) % 2]

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch what `before` and `after` have."""
        return zip(self.before, self.after, strict=True)

    @cached_property
    def middle(self) -> StateBuffer:
        """For each batch a buffer for states within a step. Its content is lost after the step."""
        return self._allocate("middle.bin")

    def embed(self, batches: list[torch.Tensor], checkpoint: Checkpoint) -> None:
        """Run the first step: write the embeddings of the token batches [batch, length]."""
        embedding = checkpoint.read(checkpoint.family.embedding)
        for batch, (_, after) in zip(batches, self.pairs(), strict=True):
            after.copy_(embedded(checkpoint, batch, embedding))

    def commit(self) -> None:
        """Note that a step is complete for all batches."""
        self.done += 1
        self._write_progress()
        self._processes.least(self.done)


def remaining_layers(streams: Sequence[HiddenStates], layers: int, embed: Callable[[], None]) -> Iterator[int]:
    """The remaining layers for streams of states that go in step.

    A layer counts as done when the next one is requested. Results that must survive a kill must be on disk by then.

    Args:
        streams: the states of one model or of several.
        layers: how many layers the (first) model has.
        embed: gives all streams their first states; called if no walk before this one has done so.
    """
    if streams[0].done == 0:
        embed()
        for stream in streams:
            stream.commit()
    for layer in range(streams[0].layers_done, layers):
        yield layer
        for stream in streams:
            stream.commit()
