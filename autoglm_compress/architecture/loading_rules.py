"""Which shapes `transformers` loads."""

from typing import Any

from autoglm_compress.architecture.shape import ModelShape
from autoglm_compress.architecture.sizes_in_config import resized_config


def refusal(config: Any, shape: ModelShape) -> str:
    """Why `transformers` refuses a model's config object with another shape. Empty if it accepts it."""
    if shape.family.transformers_derives_head_dim and shape.axis("query") != shape.hidden_size:
        return (
            f"it assumes a head_dim of hidden_size {shape.hidden_size} / {shape.num_attention_heads} heads, but "
            f"head_dim is {shape.head_dim}: the stage width cuts both, with hidden_size and num_attention_heads."
        )
    resized = resized_config(config.to_dict(), shape, range(shape.num_hidden_layers))
    try:
        type(config).from_dict(resized)
    except Exception as error:  # transformers raises many kinds
        return " ".join(str(error.__cause__ or error).split())
    return ""


def likely_refusal(source: ModelShape, shape: ModelShape) -> str:
    """The same without a config: strict for every family where only some are."""
    if source.family.transformers_derives_head_dim:
        return "" if shape.axis("query") == shape.hidden_size else "head_dim is derived"
    divisible = shape.hidden_size % shape.num_attention_heads == 0
    return "" if divisible or source.hidden_size % source.num_attention_heads else "hidden_size is not divisible"
