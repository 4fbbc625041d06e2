"""The tensors of kept towers that depend on the text tower's width, cut with it.

A bridge that writes to the residual stream is changed as the stream is: that is exact. Some towers also have neurons
within, as many as the stream has channels, or a multiple: of each such set, which shares a module, those stay that do
most by their weights. Where two linears follow on each other with nothing between them, they are one linear map: the
rows of it that are kept go into the first, and the second becomes the identity, so that no more is lost than the
neurons themselves.
"""

from collections.abc import Callable, Iterable

import torch

from autoglm_compress.architecture.family import INNER
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.importance import top
from autoglm_compress.cutting.lineage import Indices

Change = Callable[[str, torch.Tensor, tuple[str | int, ...]], torch.Tensor]
"""What becomes of a bridge, by its name and axes, along the residual stream."""


class BridgeCut:
    """Reads a checkpoint's kept towers for a residual stream of another width.

    Args:
        source: the checkpoint.
        width: how wide the stream is to be.
        change: what becomes of a bridge along the stream.
    """

    def __init__(self, source: Checkpoint, width: int, change: Change) -> None:
        self._source = source
        self._family = source.family
        self._change = change
        self._share = width, source.shape.hidden_size
        sets = _inner_sets(source) if width < source.shape.hidden_size else {}
        self.neurons: dict[str, Indices] = {module: self._choice(tensors) for module, tensors in sets.items()}

    def _choice(self, tensors: list[str]) -> Indices:
        """The neurons to keep of a set, whose tensors these are."""
        scores = neuron_scores({name: (self._source.read(name), self._axes(name)) for name in tensors})
        width, before = self._share
        return top(scores, len(scores) * width // before)

    def _axes(self, name: str) -> tuple[str | int, ...]:
        return self._family.bridge(name) or ()

    def read(self, name: str) -> torch.Tensor:
        """A tensor of a kept tower as it is to be written."""
        tensor, axes = self._source.read(name), self._axes(name)
        if INNER in axes and self.neurons:
            kept = torch.tensor(self.neurons[_module(name, self._family.folded)])
            tensor = self._folded(name, tensor)
            for dimension, axis in enumerate(axes):
                tensor = tensor.index_select(dimension, kept) if axis == INNER else tensor
        return self._change(name, tensor, axes)

    def _folded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The first of two linears with the second in it, and the identity in the place of the second."""
        if self._family.folded is None:
            return tensor
        first, second = self._family.folded
        if name == f"{second}.weight":
            return torch.eye(len(tensor), dtype=tensor.dtype)
        if name.rpartition(".")[0] != first:
            return tensor
        after = self._source.read(f"{second}.weight").float()
        return (after @ tensor.float().flatten(1 if tensor.dim() > 1 else 0)).view_as(tensor).to(tensor.dtype)


def neuron_scores(tensors: dict[str, tuple[torch.Tensor, tuple[str | int, ...]]]) -> torch.Tensor:
    """What the neurons of a set do at most, by the weights alone: scores [neurons].

    The product of the norms of a neuron's rows in all linears that make it, or the size of its gain where a norm makes
    it, and the norm of its columns in all that read it.

    Args:
        tensors: the set's tensors by name, each with its axes.
    """
    gains = [tensor.float().abs() for name, (tensor, _) in tensors.items() if name.endswith("norm.weight")]
    matrices = [(tensor.float(), axes) for tensor, axes in tensors.values() if tensor.dim() > 1]
    makers = gains or [tensor.flatten(1).norm(dim=1) for tensor, axes in matrices if axes[0] == INNER]
    readers = [tensor.square().sum(0) for tensor, axes in matrices if axes[0] != INNER and axes[1] == INNER]
    return torch.stack(makers).prod(0) * torch.stack(readers).sum(0).sqrt()


def _inner_sets(source: Checkpoint) -> dict[str, list[str]]:
    """The tensors with neurons of each set, by the module that they share."""
    family = source.family
    sets: dict[str, list[str]] = {}
    for name in _names(source.kept_tensors.values()):
        if INNER in (family.bridge(name) or ()):
            sets.setdefault(_module(name, family.folded), []).append(name)
    return sets


def _names(towers: Iterable[Iterable[str]]) -> Iterable[str]:
    return (name for names in towers for name in names)


def _module(name: str, folded: tuple[str, str] | None) -> str:
    """The module that a tensor shares with the others of its set."""
    linear = name.rpartition(".")[0]
    if folded is not None and linear == folded[0]:
        linear = folded[1]
    return linear.rpartition(".")[0]
