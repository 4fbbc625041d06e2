"""The families that are exported to MNN, and what the graph needs to know of each."""

from typing import Any

import torch

from autoglm_compress.architecture import ModelShape, Scheme

ACTIVATION = "silu"
FAMILIES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
    | {"GlmForCausalLM", "Glm4ForCausalLM"}
)
TURNS_NEIGHBOURS = frozenset({"GlmForCausalLM", "Glm4ForCausalLM"})
"""Families whose RoPE turns neighbouring channels; the graph turns those half of the turned channels apart."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
BITS = (4, 8)


def shape_problem(shape: ModelShape) -> str | None:
    """Why MNN cannot run a model of this shape; None if it can."""
    architecture = shape.family.architecture
    if shape.family.kept:
        return f"{architecture} has {', '.join(shape.family.kept)} beside its text, and only text models are exported"
    if architecture not in FAMILIES:
        return f"there is no graph for {architecture}: there are graphs for {', '.join(sorted(FAMILIES))}"
    schemes = shape.quantization.schemes if shape.quantization else {}
    for module, scheme in schemes.items():
        if scheme.bits not in BITS:
            return f"{module}: INT{scheme.bits}: linears of {' and '.join(map(str, BITS))} bits are exported"
    return None


def config_problem(config: Any) -> str | None:
    """Why MNN cannot run a model of a text tower's `transformers` config; None if it can."""
    if config.hidden_act != ACTIVATION:
        return f"hidden_act {config.hidden_act}: the graph has {ACTIVATION} there"
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        return f"rope_type {kind}: the graph has the same angles at every length, as {', '.join(ROPE_TYPES)} have"
    if kind != "default" and (config.rope_parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        return f"rope_type {kind} on a part of each head: the graph has one or the other"
    return None


def windows(config: Any) -> tuple[int, ...]:
    """Of each layer 1 if it has a sliding window and 0 if it sees everything; empty if all layers see everything."""
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "sliding_window", None) or (kinds and "sliding_attention" not in kinds):
        return ()
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    return tuple(int(kind == "sliding_attention") for kind in kinds)


def rotary_dimensions(shape: ModelShape, config: Any) -> int:
    """How many channels of each head RoPE turns."""
    return int(shape.head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def rope(shape: ModelShape, config: Any) -> tuple[torch.Tensor, float]:
    """RoPE's frequencies, fp32 [head_dim / 2], and what its sines are scaled by, as `transformers` has them.

    Channels that are not turned have the frequency 0.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.rope_parameters
    if settings["rope_type"] != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, torch.device("cpu"))
        return frequencies, scaling
    turned = rotary_dimensions(shape, config)
    frequencies = torch.zeros(shape.head_dim // 2)
    frequencies[: turned // 2] = 1.0 / settings["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned)
    return frequencies, 1.0


def row_order(shape: ModelShape, config: Any, module: str) -> torch.Tensor | None:
    """The order of the rows of a module (its full name), int64 [out]; None if it is the checkpoint's.

    The graph turns channels half a head apart. Of queries and keys whose neighbours are turned, even channels go to the
    first half and odd ones to the second, and what is not turned fills both up. Queries and keys change alike, so their
    products stay.
    """
    attention, name = shape.family.roles.attention, shape.family.place(module).name
    if shape.family.architecture not in TURNS_NEIGHBOURS or name not in (attention.query, attention.key):
        return None
    heads = shape.num_attention_heads if name == attention.query else shape.num_key_value_heads
    turned = rotary_dimensions(shape, config)
    first, second = torch.arange(turned, shape.head_dim).chunk(2) if turned < shape.head_dim else ([], [])
    channels = torch.tensor([*range(0, turned, 2), *first, *range(1, turned, 2), *second])
    return (torch.arange(heads).unsqueeze(1) * shape.head_dim + channels).flatten()


def scheme_of(shape: ModelShape, module: str) -> Scheme | None:
    """How a module is quantized; None if it is not."""
    return shape.quantization.schemes.get(module) if shape.quantization else None
