"""The sizes of a shape written into a `config.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_compress.architecture.family import Family
from autoglm_compress.architecture.shape import ModelShape

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
TYING = "tie_word_embeddings"
SHARED_ADAPTER = "shared_adapter"
"""The setting that says that the projections of images and sounds are one. `transformers` does not know it."""
PER_LAYER = ("layer_types", "mlp_layer_types")
"""Names of config lists with one entry per layer, besides the list that a family names."""


def lists_per_layer(family: Family) -> tuple[str, ...]:
    """The names of the config lists with one entry per layer, for a family."""
    return tuple(dict.fromkeys([*PER_LAYER, *([family.layer_kinds] if family.layer_kinds else [])]))


def resized_config(
    config: Mapping[str, Any],
    shape: ModelShape,
    layers: Sequence[int] | None = None,
    per_layer: Mapping[str, list[Any]] | None = None,
) -> dict[str, Any]:
    """A `config.json` for another shape of the same model.

    head_dim is always written: it no longer follows from hidden_size / num_attention_heads.

    Args:
        config: of the model as it was.
        shape: the other shape.
        layers: the indices of the layers kept, for the settings that have an entry per layer.
        per_layer: such settings with all entries, written even if the config lacks them.
    """
    family, config = shape.family, with_sharing(config, shape.shared_adapter)
    if family.config not in config:  # ROOT, or a config of the time before the part was one
        changed = dict(config) | _with_width(config, shape)
        return _resized(changed, shape, layers, per_layer or {}) | {TYING: shape.tie_word_embeddings}
    text = _resized(dict(config[family.config]), shape, layers, per_layer or {})
    if TYING in text:
        text[TYING] = shape.tie_word_embeddings
    return dict(config) | _with_width(config, shape) | {family.config: text, TYING: shape.tie_word_embeddings}


def _with_width(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """The parts of a config that say, outside the text tower's, how wide it is."""
    changed: dict[str, Any] = {}
    for part, _, name in (path.partition(".") for path in shape.family.width_in_config):
        if part in config:
            changed[part] = dict(config[part]) | {name: shape.hidden_size}
    return changed


def _resized(
    text: dict[str, Any], shape: ModelShape, layers: Sequence[int] | None, per_layer: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """The text tower's part of the config."""
    text |= per_layer
    text |= {size: getattr(shape, size) for size in SIZES}
    if text.get("max_window_layers"):
        text["max_window_layers"] = min(text["max_window_layers"], shape.num_hidden_layers)
    for name in lists_per_layer(shape.family):
        if layers is not None and text.get(name):
            text[name] = [text[name][layer] for layer in layers]
    return text


def with_sharing(config: Mapping[str, Any], shared_adapter: bool) -> dict[str, Any]:
    """A `config.json` that says that an adapter is shared, or that does not."""
    rest = {name: value for name, value in config.items() if name != SHARED_ADAPTER}
    return rest | ({SHARED_ADAPTER: True} if shared_adapter else {})


def untied(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A `config.json` in which embedding and head are two matrices."""
    changed = dict(config) | {TYING: False}
    if TYING in config.get(family.config, {}):
        changed[family.config] = dict(config[family.config]) | {TYING: False}
    return changed
