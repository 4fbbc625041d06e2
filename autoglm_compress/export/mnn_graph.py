"""The computation of a model as a module of torch, for MNN's converter to trace.

It has norms, RoPE and the order of things, and no matrices: a linear is a place that the converter fills from the
checkpoint, and attention is one operator of the engine. Inputs and outputs are those that MNN's `llm` engine calls a
model with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint

INPUTS = ("input_ids", "attention_mask", "position_ids", "logits_index")
OUTPUTS = ("logits", "hidden_states")
OPSET = 15


@dataclass(frozen=True)
class Place:
    """A linear of the graph: the checkpoint's module, its inputs and outputs, and whether it adds a bias."""

    module: str
    in_features: int
    out_features: int
    biased: bool

    @property
    def bias(self) -> bool | None:
        """None where there is none, as the converter asks for it."""
        return True if self.biased else None


class Operators:
    """What makes the engine's operators: `llmexport`'s `FakeLinear` and `FusedAttention`, and the linears so made."""

    def __init__(self, linear: Callable[..., nn.Module], attention: Callable[..., nn.Module]) -> None:
        self._linear, self.attention = linear, attention
        self.places: dict[str, Place] = {}

    def linear(self, shape: ModelShape, module: str, size: tuple[int, ...], biased: bool) -> nn.Module:
        """A linear of a module of the checkpoint with [out, in] features."""
        head = module == shape.family.roles.head
        name = "/lm/lm_head/Linear" if head else "/" + module.replace(".", "/") + "/Linear"
        self.places[name] = Place(module, size[1], size[0], biased)
        return self._linear(size[1], size[0], biased, name)


class Norm(nn.Module):
    """RMSNorm in fp32, as the converter knows it."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normed states."""
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * (states * torch.rsqrt(variance + self.eps))


class Attention(nn.Module):
    """Attention of one layer, [1, tokens, hidden] to the same."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators, layer: int) -> None:
        super().__init__()
        shape, roles = checkpoint.shape, checkpoint.shape.family.roles.attention
        self.head_dim = shape.head_dim
        self.query, self.key, self.value, self.output = (
            _linear(checkpoint, operators, layer, name) for name in (roles.query, roles.key, roles.value, roles.output)
        )
        self.query_norm, self.key_norm = (
            _norm(checkpoint, layer, f"{name.rpartition('.')[0]}.{short}_norm")
            for name, short in ((roles.query, "q"), (roles.key, "k"))
        )
        name = f"/layers.{layer}/self_attn/FusedAttention"
        self.attention = operators.attention(shape.axis("query"), True, name, layer)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, before norms."""
        heads = (1, states.shape[1], -1, self.head_dim)
        query = _turned(self.query_norm(self.query(states).view(heads)), cos, sin)
        key = _turned(self.key_norm(self.key(states).view(heads)), cos, sin)
        return self.output(self.attention(query, key, self.value(states).view(heads), mask))


class FeedForward(nn.Module):
    """The gated feed-forward network of one layer."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators, layer: int) -> None:
        super().__init__()
        roles = checkpoint.shape.family.roles.ffn
        self.activation = nn.functional.silu
        self.fused = roles.gate_up is not None
        names = (roles.gate_up, roles.gate, roles.up)
        self.inputs = nn.ModuleList(_linear(checkpoint, operators, layer, name) for name in names if name)
        self.down = _linear(checkpoint, operators, layer, roles.down)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, before norms."""
        if self.fused:
            gate, up = self.inputs[0](states).chunk(2, dim=-1)
        else:
            gate, up = (linear(states) for linear in self.inputs)
        return self.down(self.activation(gate) * up)


class Layer(nn.Module):
    """A layer, with norms before its parts, and after them where the family has such."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators, layer: int) -> None:
        super().__init__()
        family = checkpoint.shape.family
        self.before, self.between = (_norm(checkpoint, layer, name) for name in _norms_before(checkpoint.shape))
        self.after = nn.ModuleList(
            _norm(checkpoint, layer, family.writer_norms.get(writer))
            for writer in (family.attention_output, family.mlp_output)
        )
        self.attention = Attention(checkpoint, operators, layer)
        self.feed_forward = FeedForward(checkpoint, operators, layer)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer."""
        states = states + self.after[0](self.attention(self.before(states), mask, cos, sin))
        return states + self.after[1](self.feed_forward(self.between(states)))


class Graph(nn.Module):
    """A model from embeddings [tokens, 1, hidden] to logits [1, tokens asked for, vocabulary].

    `frequencies` fp32 [head_dim / 2] and `scaling` are RoPE's, and `windows` says of each layer which of two masks it
    takes, or is empty where there is one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        operators: Operators,
        frequencies: torch.Tensor,
        scaling: float,
        windows: tuple[int, ...],
    ) -> None:
        super().__init__()
        shape = checkpoint.shape
        self.hidden_size, self.scaling, self.windows = shape.hidden_size, scaling, windows
        self.frequencies = frequencies
        self.layers = nn.ModuleList(Layer(checkpoint, operators, layer) for layer in range(shape.num_hidden_layers))
        self.norm = Norm(checkpoint.read(f"{shape.family.roles.final_norm}.weight"), checkpoint.norm_eps)
        head = shape.family.roles.head
        self.head = operators.linear(shape, head, (shape.vocab_size, shape.hidden_size), False)

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and the states before them, of the last token for the index -1 and of all for 0."""
        angles = positions.float().reshape(-1, 1) * self.frequencies
        both = torch.stack([torch.cos(angles), torch.sin(angles)]) * self.scaling
        cos, sin = torch.cat((both, both), dim=-1).unsqueeze(2).unsqueeze(1)
        states = states.view(1, -1, self.hidden_size)
        for number, layer in enumerate(self.layers):
            states = layer(states, mask[self.windows[number]] if self.windows else mask, cos, sin)
        normed = self.norm(states[:, logits_index.to(torch.int64) :, :])
        return self.head(normed), normed


def _norms_before(shape: ModelShape) -> tuple[str, str]:
    """The norms that attention and the feed-forward network read through."""
    first, second = shape.family.roles.attention.query, shape.family.roles.ffn
    reads = {reader: norm for norm, readers in shape.family.smoothing.items() for reader in readers}
    return reads[first], next(reads[name] for name in (second.gate_up, second.gate) if name)


def _linear(checkpoint: Checkpoint, operators: Operators, layer: int, name: str) -> nn.Module:
    shape = checkpoint.shape
    tensors = shape.layer_tensors(layer)
    module = shape.family.layer_prefix(layer) + name
    return operators.linear(shape, module, tensors[f"{name}.weight"], f"{name}.bias" in tensors)


def _norm(checkpoint: Checkpoint, layer: int, name: str | None) -> nn.Module:
    """A norm of a layer; what changes nothing if the model has none there."""
    if f"{name}.weight" not in checkpoint.shape.layer_tensors(layer):
        return nn.Identity()
    weight = checkpoint.read(f"{checkpoint.shape.family.layer_prefix(layer)}{name}.weight")
    return Norm(weight, checkpoint.norm_eps)


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """States [1, tokens, heads, head_dim] whose channels are turned, each with the one half a head away."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def trace(graph: Graph, shape: ModelShape, windows: tuple[int, ...], file: Path) -> None:
    """Write a graph as ONNX, with operators that only MNN's converter knows."""
    tokens = 3
    mask = torch.zeros(*((2,) if windows else ()), 1, 1, tokens, tokens)
    first, axes = mask.dim() - 2, {"input_ids": {0: "seq_len"}, "position_ids": {1: "seq_len"}}
    inputs = (
        torch.zeros(tokens, 1, shape.hidden_size),
        mask,
        torch.arange(tokens).int()[None],
        torch.tensor([-1]).int(),
    )
    torch.onnx.export(
        graph.eval(),
        inputs,
        str(file),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        dynamic_axes=axes | {"attention_mask": {first: "seq_len", first + 1: "seq_len"}},
        opset_version=OPSET,
        dynamo=False,  # the newer exporter does not trace the operators of llmexport
    )
