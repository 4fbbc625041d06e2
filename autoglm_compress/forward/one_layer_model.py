"""A model of a single decoder layer, whose weights are exchanged, and what stands beside the layers.

The layer is `transformers`' own: a model of one layer is built on the meta device and given the weights of each layer
in turn. Hidden states go in as `inputs_embeds`, so masks and rotary embeddings are `transformers`' too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoglm_compress.architecture import Family
from autoglm_compress.checkpoint import Checkpoint


@dataclass(frozen=True)
class Fork:
    """A sequence that forks: `shared` tokens seen by all, then branches of such lengths that do not see each other."""

    shared: int
    branches: tuple[int, ...]

    def arguments(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """What tells a model of `transformers` so: position ids and an additive mask [1, 1, length, length]."""
        never = torch.finfo(like.dtype).min
        length = self.shared + sum(self.branches)
        mask = torch.full((length, length), never, dtype=like.dtype, device=like.device)
        mask[self.shared :, : self.shared] = 0
        positions, start = list(range(self.shared)), 0
        for size in (self.shared, *self.branches):
            mask[start : start + size, start : start + size].triu_(1)
            positions += range(self.shared, self.shared + size) if start else ()
            start += size
        return {"position_ids": torch.tensor([positions], device=like.device), "attention_mask": mask[None, None]}


def text_model(config: Any, family: Family, dtype: torch.dtype) -> nn.Module:
    """The text tower of a family that a config describes, without a head, on the meta device."""
    import transformers

    with torch.device("meta"):
        if family.text_class is not None:
            return getattr(transformers, family.text_class)._from_config(config, dtype=dtype)
        return transformers.AutoModel.from_config(config, dtype=dtype)


def _small_config(checkpoint: Checkpoint, layers: range) -> Any:
    """The config of a text tower of some of the layers, with an embedding that takes no memory."""
    config = checkpoint.unquantized_config()
    config.num_hidden_layers = len(layers)
    config.vocab_size = 1
    config.pad_token_id = None
    for name, entries in checkpoint.lists_per_layer.items():
        setattr(config, name, [entries[layer] for layer in layers])
    return config


class OneLayerModel:
    """A model of `transformers` with one decoder layer, whose weights are exchanged."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._models: dict[tuple[Any, ...], nn.Module] = {}

    def _build(self, layer: int) -> nn.Module:
        """The one-layer model for the kind of layer (such as full or sliding attention) that this one is."""
        lists = self.checkpoint.lists_per_layer
        kind = tuple(entries[layer] for entries in lists.values())
        if kind not in self._models:
            config = _small_config(self.checkpoint, range(layer, layer + 1))
            model, roles = text_model(config, self.checkpoint.family, self.dtype), self.checkpoint.family.roles
            for module in (roles.embedding, roles.final_norm):
                model.set_submodule(self.checkpoint.family.within_text(module), nn.Identity())
            model.rotary_emb = type(model.rotary_emb)(config=config).to(self.device)
            self._models[kind] = model.eval()
        return self._models[kind]

    def load(self, layer: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
        """A decoder layer with its weights, and the function that sends hidden states, forked or not, through it."""
        model = self._build(layer)
        weights = {k: self.to_compute(v) for k, v in self.checkpoint.read_layer(layer).items()}
        model.layers[0].load_state_dict(weights, assign=True)
        model.layers[0].requires_grad_(False)

        def run(hidden: torch.Tensor, fork: Fork | None = None) -> torch.Tensor:
            hidden = hidden.to(self.device)
            arguments = fork.arguments(hidden) if fork else {}
            return model(inputs_embeds=hidden, use_cache=False, **arguments).last_hidden_state

        return model.layers[0], run

    def release(self) -> None:
        """Let go of the layer's weights."""
        self._models.clear()

    def to_compute(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight on the device and in the dtype that the walk computes in."""
        return tensor.to(device=self.device, dtype=self.dtype)


def final_norm(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """The norm before the head, `transformers`' own of this family, with the checkpoint's weight."""
    dtype, family = compute_dtype(checkpoint, device), checkpoint.family
    model = text_model(_small_config(checkpoint, range(0)), family, dtype)
    norm = model.get_submodule(family.within_text(family.roles.final_norm))
    weight = checkpoint.read(checkpoint.family.final_norm).to(device=device, dtype=dtype)
    norm.load_state_dict({"weight": weight}, assign=True)
    return norm.requires_grad_(False)


def compute_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """fp32 on a CPU, where it keeps statistics exact; the checkpoint's own dtype on a GPU."""
    return torch.float32 if device.type == "cpu" else checkpoint.dtype


def fast_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype of a walk whose last bits do not matter: bf16 where the checkpoint and the CPU's instructions have it.

    There it is several times faster than fp32; elsewhere a CPU would convert back and forth.
    """
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and checkpoint.dtype == torch.bfloat16 else compute_dtype(checkpoint, device)
