"""The families that are exported to ONNX Runtime, and what its graph says of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.text_models import towers_problem

MOST_TOKENS = 131_072
"""The longest context: RoPE's tables have a row for each token of it."""
HEAD_STEP = 16
"""GroupQueryAttention of ONNX Runtime turns heads by RoPE whose channels divide by this."""


@dataclass(frozen=True)
class GraphFamily:
    """How a family differs in the graph.

    `model_type` is what onnxruntime-genai calls it. `interleaved` says that RoPE turns neighbouring channels, `norms`
    that queries and keys are normed, and `sandwich` that attention and FFN are normed before they are added.
    """

    model_type: str
    interleaved: bool = False
    norms: bool = False
    sandwich: bool = False


FAMILIES: Mapping[str, GraphFamily] = {
    "LlamaForCausalLM": GraphFamily("llama"),
    "MistralForCausalLM": GraphFamily("mistral"),
    "Qwen2ForCausalLM": GraphFamily("qwen2"),
    "Qwen3ForCausalLM": GraphFamily("qwen3", norms=True),
    "GlmForCausalLM": GraphFamily("chatglm", interleaved=True),
    "Glm4ForCausalLM": GraphFamily("chatglm", interleaved=True, sandwich=True),
}


def graph_family(shape: ModelShape) -> GraphFamily:
    """How a model of this shape, which has no `shape_problem`, differs in the graph."""
    return FAMILIES[shape.family.architecture]


def shape_problem(shape: ModelShape) -> str | None:
    """Why ONNX Runtime cannot run a model of this shape; None if it can."""
    architecture = shape.family.architecture
    if problem := towers_problem(shape):
        return problem
    if architecture not in FAMILIES:
        return f"there is no graph for {architecture}: there are graphs for {', '.join(FAMILIES)}"
    if shape.head_dim % HEAD_STEP:
        return f"head_dim {shape.head_dim}: GroupQueryAttention of ONNX Runtime needs a multiple of {HEAD_STEP}"
    return None


def context_length(config: Any) -> int:
    """The tokens that the graph has angles for."""
    return min(config.max_position_embeddings, MOST_TOKENS)
