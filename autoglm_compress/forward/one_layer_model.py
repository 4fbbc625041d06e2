"""A model of a single decoder layer, whose weights are exchanged, and what stands beside the layers.

The layer is `transformers`' own: a model of one layer is built on the meta device and given the weights of each layer
in turn. Hidden states go in as `inputs_embeds`, so masks and rotary embeddings are `transformers`' too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

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


class OneLayerModel:
    """A model of `transformers` with one decoder layer, whose weights are exchanged."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._models: dict[str, nn.Module] = {}

    def _build(self, layer: int) -> nn.Module:
        """The one-layer model for the kind of attention (full, sliding) that this layer has."""
        from transformers import AutoModel

        kinds = getattr(self.checkpoint.model_config, "layer_types", None)
        kind = kinds[layer] if kinds else "only"
        if kind not in self._models:
            config = self.checkpoint.unquantized_config()
            config.num_hidden_layers = 1
            config.vocab_size = 1
            config.pad_token_id = None
            if kinds:
                config.layer_types = [kind]
            with torch.device("meta"):
                model = AutoModel.from_config(config, dtype=self.dtype)
            model.embed_tokens = nn.Identity()
            model.norm = nn.Identity()
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
    from transformers import AutoModel

    config = checkpoint.unquantized_config()
    config.num_hidden_layers = 0
    config.vocab_size = 1
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = []
    dtype = compute_dtype(checkpoint, device)
    with torch.device("meta"):
        norm = AutoModel.from_config(config, dtype=dtype).norm
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
