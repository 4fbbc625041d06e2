"""Which parts of the run's source a pruned checkpoint still has.

Statistics are measured once, on the source, so a stage that cuts a checkpoint which was cut before has to know
which layer, head, neuron or channel of the source each of the present ones was.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint.writer import write_json

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Lineage:
    """Indices into the source: per layer for heads, KV heads and FFN neurons, one list for layers and channels."""

    layers: Indices
    channels: Indices
    heads: tuple[Indices, ...]
    key_value_heads: tuple[Indices, ...]
    neurons: tuple[Indices, ...]

    @classmethod
    def of_source(cls, shape: ModelShape) -> "Lineage":
        """Everything is still there."""
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
        return Lineage(
            layers=_take(self.layers, layers),
            channels=self.channels,
            heads=tuple(self.heads[layer] for layer in layers),
            key_value_heads=tuple(self.key_value_heads[layer] for layer in layers),
            neurons=tuple(self.neurons[layer] for layer in layers),
        )

    def keep_channels(self, channels: Indices) -> "Lineage":
        """Keep only some of the present residual channels."""
        return replace(self, channels=_take(self.channels, channels))

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
        """The source's residual stream [..., hidden_size of the source] as this checkpoint's has it."""
        return hidden[..., list(self.channels)]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "Lineage":
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        nested = {key: tuple(tuple(row) for row in data[key]) for key in ("heads", "key_value_heads", "neurons")}
        return cls(layers=tuple(data["layers"]), channels=tuple(data["channels"]), **nested)


def _take(present: Indices, kept: Indices) -> Indices:
    return tuple(present[index] for index in kept)
