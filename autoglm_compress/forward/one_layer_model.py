"""A model of a single decoder layer with exchangeable weights, and the parts outside the layers.

The layer is `transformers`' own: a model of one layer is built on the meta device and given the weights of each layer
in turn. Hidden states go in as `inputs_embeds`, so masks and rotary embeddings are `transformers`' too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoglm_compress.architecture import Family
from autoglm_compress.attention.settings import LayerAttention
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.forward.features import beside_embeddings


@dataclass(frozen=True)
class Fork:
    """A sequence that forks: `shared` tokens seen by all, then branches of such lengths that do not see each other."""

    shared: int
    branches: tuple[int, ...]

    def arguments(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fork as inputs of a `transformers` model: position ids and an additive mask [1, 1, length, length]."""
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


def text_model(config: Any, family: Family, dtype: torch.dtype) -> Any:
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
        self._kind: tuple[Any, ...] | None = None
        self._model: Any = None
        self._tried: set[tuple[Any, ...] | None] = set()

    def _build(self, layer: int) -> Any:
        """The one-layer model for the kind of layer (such as full or sliding attention) that this one is."""
        lists = self.checkpoint.lists_per_layer
        kind = tuple(entries[layer] for entries in lists.values())
        if self._model is None or self._kind != kind:
            self._kind, self._model = kind, None  # so that no layer of another kind stays in memory
            config = _small_config(self.checkpoint, range(layer, layer + 1))
            model, roles = text_model(config, self.checkpoint.family, self.dtype), self.checkpoint.family.roles
            for module in (roles.embedding, roles.final_norm):
                model.set_submodule(self.checkpoint.family.within_text(module), nn.Identity())
            model.rotary_emb = type(model.rotary_emb)(config=config).to(self.device)
            stored, built = self.checkpoint.shape.layer_tensors(layer).keys(), model.layers[0].state_dict().keys()
            if stored != built:
                raise ValueError(f"layer {layer}: the family and transformers differ in {sorted(stored ^ built)}")
            self._model = model.eval()
        return self._model

    def load(self, layer: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
        """A decoder layer with its weights, and the function that sends hidden states, forked or not, through it.

        The function takes the ids of the rows too, where features stand among them.
        """
        model = self._build(layer)
        prefix = self.checkpoint.family.layer_prefix(layer)
        # One by one, so that neither the layer before nor what is stored is in memory beside all of the new one.
        for name in self.checkpoint.shape.layer_tensors(layer):
            weight = {name: self.to_compute(self.checkpoint.read(prefix + name))}
            model.layers[0].load_state_dict(weight, strict=False, assign=True)
        model.layers[0].requires_grad_(False)
        if self.checkpoint.attention is not None:
            self.attend(self.checkpoint.attention.layer(layer, every_query=True))

        def run(hidden: torch.Tensor, rows: torch.Tensor | None = None, fork: Fork | None = None) -> torch.Tensor:
            hidden = hidden.to(self.device)
            arguments = fork.arguments(hidden) if fork else beside_embeddings(self.checkpoint, rows, layer)
            return model(inputs_embeds=hidden, use_cache=False, **arguments).last_hidden_state

        if self._kind not in self._tried:
            self._try_out(layer, run)
            self._tried.add(self._kind)
        return model.layers[0], run

    def _try_out(self, layer: int, run: Callable[..., torch.Tensor]) -> None:
        """Send two tokens through the first layer of a kind: configs can say what code cannot do.

        Raises:
            UserError: `transformers` builds the layer, and cannot run it.
        """
        try:
            run(torch.zeros(1, 2, self.checkpoint.shape.hidden_size, dtype=self.dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many kinds; the user needs one sentence
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(".")
            raise UserError(
                f"{self.checkpoint.folder}: transformers cannot run layer {layer}: {reason}. Check what config.json "
                "says of attention, such as rotary embeddings, sliding windows and kinds of layers, and whether the "
                "installed transformers can run this model."
            ) from None

    def attend(self, attention: LayerAttention) -> None:
        """Let the loaded layer attend so, and those loaded after it."""
        from autoglm_compress.attention.dynamic_sparse import NAME, set_options  # transformers takes seconds to import

        self._model.set_attn_implementation(NAME)
        set_options(self._model, lambda _: attention)

    def release(self) -> None:
        """Free the layer's weights."""
        self._model = None

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

    bf16 is several times faster than fp32 there. Other CPUs would convert back and forth.
    """
    return fast_cpu_dtype(checkpoint.dtype) if device.type == "cpu" else compute_dtype(checkpoint, device)


def fast_cpu_dtype(stored: torch.dtype) -> torch.dtype:
    """`fast_dtype` on this machine's CPU, of a checkpoint stored in such a dtype."""
    return stored if stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32
