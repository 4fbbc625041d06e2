"""The features of chats before the last linears of a model's towers, and the towers themselves with some parts trained.

Towers run as `features.py` runs them. Hooks on those linears see what goes in and what comes out.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.forward.features import Features, decoder_arguments, towers_of
from autoglm_compress.runtime import Runtime

BEFORE = "model."
Found = dict[str, list[torch.Tensor]]
"""Tensors by the kind of features, in the order in which a tower gives them."""


class Towers:
    """A checkpoint's towers, and the linears that write their features, by the kind of these.

    Args:
        checkpoint: has towers, and the features that its run's chats have.
        device: where towers run.
        dtype: what they compute in.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        assert isinstance(checkpoint.features, Features)  # the caller has looked
        self._features, self._width = checkpoint.features, checkpoint.shape.hidden_size
        self._model = towers_of(checkpoint, device, dtype, {})
        self._projections = checkpoint.family.projections
        # By their names in files, where the model may have one more word before.
        self._modules = {name.removeprefix(BEFORE): module for name, module in self._model.named_modules()}
        self.linears = {kind: self._modules[each.linear] for kind, each in self._projections.items()}

    def run(self, number: int) -> tuple[Found, Found]:
        """Let the towers see a chat: what goes into the linears, and what comes out of them, each [features, size]."""
        found: tuple[Found, Found] = {}, {}
        with _recorded(self.linears, *found):
            decoder_arguments(self._model, self._features.inputs_of(number), self._width)
        return found

    def trained_parts(self) -> dict[str, nn.Parameter]:
        """The parameters of the modules before the linears, by their names in files."""
        patterns = [pattern for each in self._projections.values() for pattern in each.before]
        return {
            f"{module}.{name}": parameter
            for module in (_last(self._modules, pattern) for pattern in patterns)
            for name, parameter in self._modules[module].named_parameters()
        }


def _last(modules: Iterable[str], pattern: str) -> str:
    """The last of the modules whose names a pattern describes, in which `*` stands for a number."""
    return [name for name in modules if fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")][-1]


@contextmanager
def _recorded(linears: Mapping[str, nn.Module], inputs: Found, outputs: Found) -> Iterator[None]:
    def hook(kind: str) -> Any:
        def record(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs.setdefault(kind, []).append(given[0].flatten(0, -2))
            outputs.setdefault(kind, []).append(output.flatten(0, -2))

        return record

    hooks = [linear.register_forward_hook(hook(kind)) for kind, linear in linears.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


class ProjectedChats:
    """What goes into the linears for each chat, in files that survive a kill: [features, in] by kind, in fp32.

    Args:
        checkpoint: has towers, and the features that its run's chats have.
        folder: for the files.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        assert isinstance(checkpoint.features, Features)  # the caller has looked
        self._checkpoint, self._features, self._folder = checkpoint, checkpoint.features, folder

    @torch.no_grad()
    def record(self, numbers: list[int], runtime: Runtime) -> None:
        """Let the towers see chats, by their numbers, that they have not seen yet."""
        missing = [number for number in numbers if not self._file(number).exists()]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        towers = Towers(self._checkpoint, runtime.device, torch.float32)
        with runtime.progress.task("features before the projections", total=len(missing), unit="chats") as advance:
            for number in missing:
                inputs, _ = towers.run(number)
                save_atomically(self._file(number), {kind: torch.cat(each).cpu() for kind, each in inputs.items()})
                advance(1)

    def of(self, number: int) -> dict[str, torch.Tensor]:
        """What goes in for a chat."""
        return load_file(self._file(number))

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._features.content(number)}.safetensors"
