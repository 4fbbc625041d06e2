"""The families that are exported to MNN, and what the graph needs to know of each."""

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.text_models import towers_problem

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GlmForCausalLM",
    "Glm4ForCausalLM",
)
TURNS_NEIGHBOURS = frozenset({"GlmForCausalLM", "Glm4ForCausalLM"})
"""Families whose RoPE turns neighbouring channels; the graph turns channels half a head apart."""


def shape_problem(shape: ModelShape) -> str | None:
    """Why MNN cannot run a model of this shape; None if it can."""
    if problem := towers_problem(shape):
        return problem
    if shape.family.architecture not in FAMILIES:
        return f"there is no graph for {shape.family.architecture}: there are graphs for {', '.join(FAMILIES)}"
    return None


def whole_heads(frequencies: torch.Tensor, head_dim: int) -> torch.Tensor:
    """RoPE's frequencies for whole heads, fp32 [head_dim / 2]: channels that are not turned have the frequency 0."""
    return torch.cat([frequencies, torch.zeros(head_dim // 2 - len(frequencies))])


def row_order(shape: ModelShape, module: str, turned: int) -> torch.Tensor | None:
    """The order of the rows of a module in the graph, int64 [out]; None if it is the checkpoint's.

    Of queries and keys whose neighbours are turned, even channels go to the first half of a head and odd ones to the
    second, and what is not turned fills both up. Queries and keys change alike, so their products stay.

    Args:
        shape: the model's.
        module: the full name of a linear.
        turned: how many channels of each head RoPE turns.
    """
    attention, name = shape.family.roles.attention, shape.family.place(module).name
    if shape.family.architecture not in TURNS_NEIGHBOURS or name not in (attention.query, attention.key):
        return None
    heads = shape.num_attention_heads if name == attention.query else shape.num_key_value_heads
    middle = (turned + shape.head_dim) // 2
    even, first = torch.arange(0, turned, 2), torch.arange(turned, middle)
    odd, second = torch.arange(1, turned, 2), torch.arange(middle, shape.head_dim)
    channels = torch.cat([even, first, odd, second])
    return (torch.arange(heads).unsqueeze(1) * shape.head_dim + channels).flatten()
