"""The families that llama.cpp runs, and what its files say of each.

llama.cpp reads the names of tensors as the `gguf` package maps them. Its `llama` architecture turns neighbouring
channels by RoPE, where most of `transformers` turns channels half a head apart: rows of queries and keys change places
there. `qwen2`, `qwen3` turn channels as `transformers` does, and Glm and Glm4 turn neighbours in both. Where positions
have sections, for time, height and width, llama.cpp turns channels half apart, also those that Glm4v has as neighbours.

Of a model with towers beside its text, the text tower is a model by itself, whose names are those of a text model. The
`qwen2vl` of the llama.cpp that is known here does not read the epsilon of norms: an embedding of zeros becomes NaN. Its
`paddleocr` computes the same, has the same positions for images, and reads it. Where images do not go along, text has
one position for time, height and width, so such a text tower runs as a `qwen2`.

`qwen2` and `chatglm` want the heads to be as wide together as the residual stream. A model that is not so goes as a
`llama`, which can be told all that it has. Of RoPE on a part of each head it can not: there, a higher base gives the
part its frequencies, and those of the rest are divided until nothing is left of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.text_models import sliding_window

ACTIVATION = "silu"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
YARN_OWN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
NO_FREQUENCY = 1e30
"""What a frequency is divided by to be none."""


@dataclass(frozen=True)
class EngineFamily:
    """How llama.cpp runs a family.

    `swaps_rows` says that q/k rows half a head apart become neighbours, `parts_rows` that neighbours come to be half
    apart, among those that RoPE turns, `square` that heads must be as wide together as the residual stream, `splits`
    that gate and up, fused in the checkpoint, are two, and `factors` that RoPE on a part of each head is told by
    factors. `sections` are the frequencies for time, height and width if the config does not say. `lacks` are the
    switches of the config that it has no tensors for.
    """

    architecture: str
    swaps_rows: bool = False
    parts_rows: bool = False
    square: bool = False
    splits: bool = False
    factors: bool = False
    sections: tuple[int, ...] | None = None
    lacks: frozenset[str] = frozenset()


_LLAMA = EngineFamily("llama", swaps_rows=True)
_QWEN2 = EngineFamily("qwen2", square=True)
_GLM4V = EngineFamily("glm4", parts_rows=True, sections=(8, 12, 12))
FAMILIES: Mapping[str, tuple[EngineFamily, ...]] = {
    "LlamaForCausalLM": (_LLAMA,),
    "MistralForCausalLM": (_LLAMA,),
    "Qwen2ForCausalLM": (_QWEN2, _LLAMA),
    "Qwen3ForCausalLM": (EngineFamily("qwen3", lacks=frozenset({"attention_bias"})),),
    "GlmForCausalLM": (EngineFamily("chatglm", square=True), EngineFamily("llama", splits=True, factors=True)),
    "Glm4ForCausalLM": (EngineFamily("glm4"),),
    "Glm4vForConditionalGeneration": (_GLM4V,),
    "Glm46VForConditionalGeneration": (_GLM4V,),
    "Qwen2_5_VLForConditionalGeneration": (EngineFamily("paddleocr", sections=(16, 24, 24)),),
    "Qwen3VLForConditionalGeneration": (
        EngineFamily("qwen3vl", sections=(24, 20, 20), lacks=frozenset({"attention_bias"})),
    ),
    "Qwen2_5OmniThinkerForConditionalGeneration": (_QWEN2, _LLAMA),
    "Qwen2AudioForConditionalGeneration": (_QWEN2, _LLAMA),
    "GlmAsrForConditionalGeneration": (_LLAMA,),
    "VoxtralForConditionalGeneration": (_LLAMA,),
}
"""By architecture, the ways to run it, the best first."""


def engine_family(shape: ModelShape) -> EngineFamily:
    """How llama.cpp runs a model of this shape, which has no `shape_problem`."""
    square = shape.axis("query") == shape.hidden_size
    return next(way for way in FAMILIES[shape.family.architecture] if square or not way.square)


def shape_problem(shape: ModelShape) -> str | None:
    """Why llama.cpp cannot run a model of this shape; None if it can."""
    architecture = shape.family.architecture
    if architecture not in FAMILIES:
        return f"llama.cpp is not known to run {architecture}: it runs {', '.join(FAMILIES)}"
    known = engine_family(shape)
    if absent := sorted(known.lacks & shape.switches):
        return f"{', '.join(absent)}: llama.cpp's {known.architecture} has no tensors for it"
    return None


def config_problem(shape: ModelShape, config: Any) -> str | None:
    """Why llama.cpp cannot run a model of a text tower's `transformers` config; None if it can."""
    if config.hidden_act != ACTIVATION:
        return f"hidden_act {config.hidden_act}: llama.cpp has {ACTIVATION} there"
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        return f"rope_type {rope['rope_type']}: llama.cpp has {', '.join(ROPE_TYPES)} for this family"
    if rope["rope_type"] == "yarn" and (own := sorted(key for key in YARN_OWN if rope.get(key) is not None)):
        return f"rope_type yarn with {', '.join(own)}: only YaRN's usual settings are known to be alike in llama.cpp"
    if rope["rope_type"] != "default" and rotary_dimensions(shape, config) != shape.head_dim:
        return f"rope_type {rope['rope_type']} on a part of each head: llama.cpp has one or the other"
    return None


def context_length(config: Any) -> int:
    """The tokens that llama.cpp reads as `transformers` does: as many as a sliding window has, which it lacks."""
    return min(config.max_position_embeddings, sliding_window(config) or config.max_position_embeddings)


def row_order(shape: ModelShape, config: Any, module: str) -> torch.Tensor | None:
    """The order of the rows of a module (its full name) in llama.cpp, int64 [out]; None if it is the checkpoint's."""
    attention, name = shape.family.roles.attention, shape.family.place(module).name
    known = engine_family(shape)
    if name not in (attention.query, attention.key) or not (known.swaps_rows or known.parts_rows):
        return None
    heads = shape.num_attention_heads if name == attention.query else shape.num_key_value_heads
    rows = torch.arange(heads * shape.head_dim).view(heads, shape.head_dim)
    if known.swaps_rows:
        return rows.view(heads, 2, -1).transpose(1, 2).flatten()
    turned, rest = rows.split((rotary_dimensions(shape, config), shape.head_dim - rotary_dimensions(shape, config)), 1)
    return torch.cat([turned[:, 0::2], turned[:, 1::2], rest], dim=1).flatten()


def rope_sections(shape: ModelShape, config: Any) -> list[int] | None:
    """How many of RoPE's frequencies turn by time, by height, by width and by nothing; None where all turn alike."""
    default = engine_family(shape).sections
    return None if default is None else [*config.rope_parameters.get("mrope_section", default), 0]


def rotary_dimensions(shape: ModelShape, config: Any) -> int:
    """How many channels of each head RoPE turns."""
    return int(shape.head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def rope_base(shape: ModelShape, config: Any) -> float:
    """RoPE's base in llama.cpp."""
    base = config.rope_parameters["rope_theta"]
    if not engine_family(shape).factors:
        return base
    return base ** (shape.head_dim / rotary_dimensions(shape, config))


def rope_factors(shape: ModelShape, config: Any) -> torch.Tensor | None:
    """What llama.cpp divides each frequency by, fp32 [channels / 2]; None where it divides by nothing."""
    if config.rope_parameters["rope_type"] == "llama3":
        return _llama3_factors(config.rope_parameters, shape.head_dim)
    turned = rotary_dimensions(shape, config)
    if not engine_family(shape).factors or turned == shape.head_dim:
        return None
    factors = torch.full((shape.head_dim // 2,), NO_FREQUENCY)
    factors[: turned // 2] = 1
    return factors


def _llama3_factors(rope: Mapping[str, Any], dimensions: int) -> torch.Tensor:
    """The factors of `rope_type: llama3`, as `_compute_llama3_parameters` of `transformers` has them."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1.0 / (share + (1 - share) / factor)).float()
