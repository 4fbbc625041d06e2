"""A decoder layer of `transformers` that runs up to the inputs of one linear, then up to those of the next.

A linear can therefore be changed before later activations are computed, and no linear needs to run twice: the inputs of
linears that write to the residual stream are kept, and later parts use their outputs instead of running the modules
that led to them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoglm_compress.architecture import Family
from autoglm_compress.forward.activations import capture_input
from autoglm_compress.forward.hidden_states import HiddenStates


class KeptActivations:
    """Activations of batches, one file each, while a layer is being quantized."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._like: dict[Path, tuple[torch.Size, torch.dtype]] = {}

    def _file(self, name: str, number: int) -> Path:
        return self._folder / f"{name}-{number:05d}.bin"

    def put(self, name: str, number: int, activations: torch.Tensor) -> None:
        """Keep a batch's activations under a name, replacing earlier ones.

        Raises:
            OSError: the disk is full.
        """
        file, activations = self._file(name, number), activations.contiguous()
        with file.open("r+b" if file.exists() else "wb") as stream:  # overwriting needs no new memory
            stream.write(activations.flatten().view(torch.uint8).numpy().data)
        self._like[file] = activations.shape, activations.dtype

    def has(self, name: str, number: int) -> bool:
        """Whether a batch's activations are kept under a name."""
        return self._file(name, number) in self._like

    def get(self, name: str, number: int) -> torch.Tensor:
        """A batch's activations, read from disk as they are used."""
        file = self._file(name, number)
        shape, dtype = self._like[file]
        return torch.from_file(str(file), size=shape.numel(), dtype=dtype).view(shape)


class StepwiseLayer:
    """The parts of one layer, for all batches; to be used in the order in which the layer runs.

    Args:
        module: the layer.
        run: a function that sends hidden states [batch, length, hidden_size] of token ids through the layer.
        batches: the token ids of all batches.
        states: the batches' hidden states before the layer, and the place for those after it.
        family: names the linears that write to the residual stream.
        kept: keeps the inputs of these linears, on a CPU. If None, everything before a part is computed again, which is
            faster on a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        batches: list[torch.Tensor],
        states: HiddenStates,
        family: Family,
        kept: KeptActivations | None,
    ) -> None:
        self._module = module
        self._run = run
        self._batches = batches
        self._states = states
        self._attention, self._writers = family.attention_output, (family.attention_output, family.mlp_output)
        self._kept = kept
        self._settled: list[str] = []

    def inputs_of(self, linear: str) -> Iterator[torch.Tensor]:
        """The inputs [batch, length, in] of a linear, batch by batch."""
        for number, (before, _) in enumerate(self._states.pairs()):
            with self._standing_in(number):
                inputs = capture_input(self._module.get_submodule(linear), self._run, before, self._batches[number])
            if self._kept and linear in self._writers:
                self._kept.put(linear, number, inputs)
            yield inputs

    def settle(self, linear: str) -> None:
        """Note that a linear has its final weights. If it writes to the residual stream, it runs for the last time."""
        if self._kept and linear in self._writers:
            self._settled.append(linear)

    def compute_outputs(self) -> None:
        """Compute the hidden states after the layer."""
        for number, (before, after) in enumerate(self._states.pairs()):
            with self._standing_in(number):
                after.copy_(self._run(before, self._batches[number]))

    @contextmanager
    def _standing_in(self, number: int) -> Iterator[None]:
        """Use a batch's known outputs instead of running attention or MLP."""
        with ExitStack() as stack:
            for linear in self._settled:
                output = self._output(linear, number)
                block = self._module.get_submodule(linear.rpartition(".")[0])
                # Attention also returns its weights, which a layer does not use.
                block.forward = _giving((output, None) if linear == self._attention else output)
                stack.callback(delattr, block, "forward")
            yield

    def _output(self, linear: str, number: int) -> torch.Tensor:
        """The outputs of a settled linear for a batch, computed at the first call."""
        kept, output = self._kept, f"{linear}-output"
        assert kept is not None  # else nothing settles
        if not kept.has(output, number):
            kept.put(output, number, self._module.get_submodule(linear)(kept.get(linear, number)))
        return kept.get(output, number)


def _giving(result: Any) -> Callable[..., Any]:
    """A function that ignores its arguments and returns a constant."""
    return lambda *_, **__: result
