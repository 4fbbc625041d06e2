"""Which parts of the run's source a pruned checkpoint still has.

Statistics are measured once, on the source. A stage that cuts a checkpoint again must therefore know the source's
number of each present layer, head, neuron and channel.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint.writer import write_json

Indices = tuple[int, ...]
BASIS = "basis.npy"
INDICES = ("layers", "channels", "heads", "key_value_heads", "neurons")


@dataclass(frozen=True)
class Lineage:
    """Indices into the source: per layer for heads, KV heads and FFN neurons, one list for layers and channels.

    `basis` [hidden_size of the source, hidden_size] replaces `channels` if it is not None: its orthonormal columns are
    the remaining directions of the source's residual stream.
    """

    layers: Indices
    channels: Indices
    heads: tuple[Indices, ...]
    key_value_heads: tuple[Indices, ...]
    neurons: tuple[Indices, ...]
    basis: torch.Tensor | None = field(default=None, compare=False)

    @classmethod
    def of_source(cls, shape: ModelShape) -> "Lineage":
        """The lineage of the source itself: nothing is removed."""
        layers = range(shape.num_hidden_layers)
        return cls(
            layers=tuple(layers),
            channels=tuple(range(shape.hidden_size)),
            heads=tuple(tuple(range(shape.num_attention_heads)) for _ in layers),
            key_value_heads=tuple(tuple(range(shape.num_key_value_heads)) for _ in layers),
            neurons=tuple(tuple(range(shape.intermediate_size)) for _ in layers),
        )

    def keep_layers(self, layers: Indices) -> "Lineage":
        """Keep only some of the present layers."""
        return replace(
            self,
            layers=_take(self.layers, layers),
            heads=tuple(self.heads[layer] for layer in layers),
            key_value_heads=tuple(self.key_value_heads[layer] for layer in layers),
            neurons=tuple(self.neurons[layer] for layer in layers),
        )

    def keep_channels(self, channels: Indices) -> "Lineage":
        """Keep only some of the present residual channels."""
        if self.basis is not None:
            return replace(self, basis=self.basis[:, list(channels)])
        return replace(self, channels=_take(self.channels, channels))

    def keep_directions(self, basis: torch.Tensor, source_hidden_size: int) -> "Lineage":
        """Keep only some directions, the orthonormal columns of [present hidden_size, kept], of the residual stream."""
        if self.basis is not None:
            return replace(self, basis=self.basis @ basis)
        rows = torch.zeros(source_hidden_size, basis.shape[1])
        rows[list(self.channels)] = basis
        return replace(self, basis=rows, channels=())

    def keep_heads(self, heads: tuple[Indices, ...], key_value_heads: tuple[Indices, ...]) -> "Lineage":
        """Keep only some of each layer's query and KV heads."""
        return replace(
            self,
            heads=tuple(map(_take, self.heads, heads)),
            key_value_heads=tuple(map(_take, self.key_value_heads, key_value_heads)),
        )

    def keep_neurons(self, neurons: tuple[Indices, ...]) -> "Lineage":
        """Keep only some of each layer's FFN neurons."""
        return replace(self, neurons=tuple(map(_take, self.neurons, neurons)))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The source's residual stream [..., hidden_size of the source] in this checkpoint's basis."""
        if self.basis is None:
            return hidden[..., list(self.channels)]
        return hidden @ self.basis.to(hidden)

    def project_gram(self, gram: torch.Tensor) -> torch.Tensor:
        """A Gram matrix of the source's residual stream, in this checkpoint's basis."""
        return self.project(self.project(gram).T).T

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, {name: getattr(self, name) for name in INDICES}, indent=None)
        if self.basis is not None:
            np.save(path.with_name(BASIS), self.basis.numpy(), allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> "Lineage":
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        nested = {key: tuple(tuple(row) for row in data[key]) for key in ("heads", "key_value_heads", "neurons")}
        found = path.with_name(BASIS)
        basis = torch.from_numpy(np.load(found, allow_pickle=False)) if found.exists() else None
        return cls(layers=tuple(data["layers"]), channels=tuple(data["channels"]), basis=basis, **nested)


def _take(present: Indices, kept: Indices) -> Indices:
    return tuple(present[index] for index in kept)
