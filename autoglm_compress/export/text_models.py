"""What all formats ask of a model before they export it: text alone, and where its windows are."""

from typing import Any

from autoglm_compress.architecture import ModelShape


def towers_problem(shape: ModelShape) -> str | None:
    """Why a model with towers beside its text cannot be exported; None if it has none."""
    if not shape.family.kept:
        return None
    towers = ", ".join(shape.family.kept)
    return f"{shape.family.architecture} has {towers} beside its text, and only text models are exported"


def towers_left(shape: ModelShape) -> str:
    """What is said where the text tower of a model goes alone."""
    return f"the file is the text tower alone, which reads text: {', '.join(shape.family.kept)} stay behind"


def has_window(config: Any, layer: int) -> bool:
    """Whether a layer has a sliding window, by the text tower's `transformers` config."""
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) if kinds is None else kinds[layer] == "sliding_attention"


def sliding_window(config: Any) -> int | None:
    """The tokens that layers with a sliding window look back on; None if all layers see everything."""
    return config.sliding_window if any(has_window(config, n) for n in range(config.num_hidden_layers)) else None
