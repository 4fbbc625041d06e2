"""The tensors of kept towers that depend on the text tower's width, cut with it.

A bridge that writes to the residual stream is changed as the stream is: that is exact. Some towers also have neurons
within, as many as the stream has channels, or a multiple: of each such set, which shares a module, those stay that do
most, by what calibration shows of them or, without images and sounds there, by their weights. Where two linears follow
on each other with nothing between them, they are one linear map: the rows of it that are kept go into the first, and
the second becomes the identity, so that no more is lost than the neurons themselves.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from autoglm_compress.architecture.family import INNER
from autoglm_compress.architecture.tower import reads_neurons
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
        activity: the root mean squares of what linears read, as `neuron_activity` finds them; a set without any is
            judged by its weights.
    """

    def __init__(self, source: Checkpoint, width: int, change: Change, activity: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._family = source.family
        self._change = change
        self._activity = activity
        self._share = width, source.shape.hidden_size
        sets = _inner_sets(source) if width < source.shape.hidden_size else {}
        self.neurons: dict[str, Indices] = {module: self._choice(tensors) for module, tensors in sets.items()}

    def _choice(self, tensors: list[str]) -> Indices:
        """The neurons to keep of a set, whose tensors these are."""
        named = {name: (self._source.read(name), self._axes(name)) for name in tensors}
        seen = any(name.removesuffix(".weight") in self._activity for name in tensors)
        scores = neuron_contributions(named, self._activity) if seen else neuron_scores(named)
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
    readers = [tensor.square().sum(0) for tensor, axes in matrices if reads_neurons(axes)]
    return torch.stack(makers).prod(0) * torch.stack(readers).sum(0).sqrt()


def neuron_contributions(
    tensors: dict[str, tuple[torch.Tensor, tuple[str | int, ...]]], activity: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What the neurons of a set do, as the stage `ffn` scores those of the text: scores [neurons].

    The root mean square of what a neuron adds to the outputs of all linears that read it.

    Args:
        tensors: the set's tensors by name, each with its axes.
        activity: the root mean squares [neurons] of what linears read, by their names.
    """
    readers = [
        (activity[name.removesuffix(".weight")] * tensor.float().norm(dim=0)).square()
        for name, (tensor, axes) in tensors.items()
        if reads_neurons(axes) and name.removesuffix(".weight") in activity
    ]
    return torch.stack(readers).sum(0).sqrt()


def neuron_readers(source: Checkpoint) -> list[str]:
    """The linears of a checkpoint's kept towers that read neurons which are cut with the stream's width."""
    tensors = (tensor for tower in source.shape.kept for tensor in tower.tensors)
    return [tensor.name.removesuffix(".weight") for tensor in tensors if tensor.reads_neurons]


def neuron_activity(source: Checkpoint, rows: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The root mean squares [neurons] of what each of those linears reads of the images and sounds in rows of ids.

    A linear that no image or sound reaches is left out.
    """
    features = source.features
    chats = set[int]() if features is None else {chat for row in rows for chat in features.chats_in(row)}
    if features is None or not chats:
        return {}
    sums: dict[str, torch.Tensor] = {}
    counts = Counter[str]()

    def add(reader: str, inputs: torch.Tensor, _: torch.Tensor) -> None:
        sums[reader] = sums.get(reader, 0) + inputs.double().square().sum(0).cpu()
        counts[reader] += len(inputs)

    for _ in features.watch(chats, {reader: partial(add, reader) for reader in neuron_readers(source)}):
        pass
    return {reader: (total / counts[reader]).sqrt().float() for reader, total in sums.items()}


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
