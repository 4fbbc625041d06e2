"""Cutting a checkpoint along its axes. The family gives the axes of every tensor, so one routine serves all stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq

import torch

from autoglm_compress.architecture import ModelShape, resized_config
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.cutting.lineage import Indices
from autoglm_compress.progress import Progress

Cut = dict[str, torch.Tensor]
"""Indices to keep along each axis that is cut, by the axis' name."""


def cut_heads(heads: Indices, key_value_heads: Indices, head_dim: int) -> Cut:
    """Keep whole heads, so that rotary embeddings inside a head stay as they are."""
    within = torch.arange(head_dim)
    rows = {"query": heads, "key_value": key_value_heads}
    return {axis: (torch.tensor(kept)[:, None] * head_dim + within).flatten() for axis, kept in rows.items()}


def cut_neurons(neurons: Indices, intermediate_size: int) -> Cut:
    """Keep FFN neurons: rows of gate and up (fused or not) and columns of down."""
    kept = torch.tensor(neurons)
    return {"intermediate": kept, "gate_up": torch.cat([kept, intermediate_size + kept])}


def slice_axes(tensor: torch.Tensor, axes: Sequence[str | int], cut: Cut) -> torch.Tensor:
    """The part of a tensor that is left when its axes are cut."""
    for dimension, axis in enumerate(axes):
        if isinstance(axis, str) and axis in cut:
            tensor = tensor.index_select(dimension, cut[axis].to(tensor.device))
    return tensor


def unchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The change that `Rewrite` makes by default."""
    return tensor


@dataclass(frozen=True)
class Rewrite:
    """A checkpoint written anew: `layers` kept, `cut_model` outside them, `cut_layer` in each, then `change` on each.

    Layers are numbered as in the source, and names given to `change` are the source's. `linked` says that files of the
    source whose tensors stay as they are may be shared with it: it is no one else's. `make_kept` gives what is written
    for each tensor of kept towers, where they change.
    """

    layers: Sequence[int]
    cut_model: Cut
    cut_layer: Callable[[int], Cut]
    change: Callable[[str, torch.Tensor], torch.Tensor] = unchanged
    linked: bool = False
    make_kept: Callable[[str], dict[str, torch.Tensor]] | None = None

    def run(self, source: Checkpoint, target: CheckpointWriter, shape: ModelShape, progress: Progress) -> None:
        """Read the source tensor by tensor and write the target unit by unit, leaving out units already written."""
        family = source.family
        first = {family.embedding: family.embedding}
        last = {name: name for name in shape.model_tensors() if name != family.embedding}
        units = [(first, self.cut_model)]
        for number, layer in enumerate(self.layers):
            old, new = family.layer_prefix(layer), family.layer_prefix(number)
            units.append(
                ({old + name: new + name for name in source.shape.layer_tensors(layer)}, self.cut_layer(layer))
            )
        units.append((last, self.cut_model))
        with progress.task("write", total=len(units), unit="units") as advance:
            for number, (names, cut) in enumerate(units):
                if not target.has(number):
                    found = {new: self._tensor(source, old, cut) for old, new in names.items()}
                    same = all(unchanged for _, unchanged in found.values()) and all(map(eq, names, found))
                    tensors = {name: tensor for name, (tensor, _) in found.items()}
                    target.write(number, tensors, same_as=source if same and self.linked else None)
                advance(1)
        config = resized_config(source.config, shape, self.layers, source.lists_per_layer)
        target.finish(config, like=source, make_kept=self.make_kept)

    def _tensor(self, source: Checkpoint, name: str, cut: Cut) -> tuple[torch.Tensor, bool]:
        """A tensor as it will be written, and whether it is unchanged."""
        before = source.read(name)
        after = self.change(name, slice_axes(before, source.family.axes_of(name), cut))
        return after, after is before
