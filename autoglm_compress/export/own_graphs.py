"""What formats with a graph of our own ask of a config, and what the graph takes from it."""

from typing import Any

import torch

from autoglm_compress.checkpoint.plain_model import meta_model

ACTIVATION = "silu"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def config_problem(config: Any) -> str | None:
    """Why no graph computes what a text tower's `transformers` config says; None if one does."""
    if config.hidden_act != ACTIVATION:
        return f"hidden_act {config.hidden_act}: the graph has {ACTIVATION} there"
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        return f"rope_type {kind}: the graph has the same angles at every length, as {', '.join(ROPE_TYPES)} have"
    return None


def rope_frequencies(config: Any, auto_class: str) -> tuple[torch.Tensor, float]:
    """RoPE's frequencies, fp32 [turned channels / 2], and what it multiplies cosines and sines by.

    Args:
        config: the text tower's, without quantization.
        auto_class: the Auto class of `transformers` for it.
    """
    rotary = meta_model(config, auto_class).base_model.rotary_emb
    made = type(rotary)(config)
    return made.inv_freq.float(), float(made.attention_scaling)
