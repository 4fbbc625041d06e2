"""Reading a checkpoint of an unknown family, to draft the family's YAML."""

from pathlib import Path
from typing import Any

from autoglm_compress.architecture.family import ROOT
from autoglm_compress.architecture.family_draft import KnownModel
from autoglm_compress.checkpoint.model_config import load_config, read_config
from autoglm_compress.checkpoint.plain_model import loaded_names, meta_model
from autoglm_compress.checkpoint.weight_files import locate_tensors
from autoglm_compress.errors import UserError

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def known_model(folder: Path) -> KnownModel:
    """Architecture, sizes and tensors of a checkpoint; tensors that `transformers` does not load are not among them.

    Raises:
        UserError: `transformers` does not know the model, its config lacks sizes, or there are no weights.
    """
    described, config, where = read_config(folder), load_config(folder), folder / "config.json"
    text = config.get_text_config(decoder=True)
    part = next((name for name in config.sub_configs if getattr(config, name, None) is text), ROOT)
    architecture = next(iter(described.get("architectures") or ()), "")
    auto_class = _auto_class(config, architecture)
    shapes = {name: info.shape for name, info in locate_tensors(folder).items()}
    if auto_class is not None:
        shapes = _loaded(config, auto_class, shapes)
    return KnownModel(
        architecture, config.model_type, auto_class, part, text.num_hidden_layers, _sizes(text, str(where)), shapes
    )


def _auto_class(config: Any, architecture: str) -> str | None:
    """The first Auto class that builds the architecture from such a config."""
    import transformers

    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping and mapping[type(config)].__name__ == architecture:
            return name
    return None


def _loaded(config: Any, auto_class: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors that `transformers` would load; all of them if it cannot build the model to say so."""
    config.quantization_config = None
    try:
        model = meta_model(config, auto_class)
    except Exception:  # the draft does without
        return shapes
    return {name: shapes[name] for name in loaded_names(model, shapes)}


def _sizes(text: Any, where: str) -> dict[str, int]:
    """The lengths of the axes of families."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if absent := [name for name in needed if not isinstance(getattr(text, name, None), int)]:
        raise UserError(f"{where}: transformers finds no {', '.join(absent)} in it.")
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return {
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "query": heads * head_dim,
        "key_value": (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        "head_dim": head_dim,
        "intermediate": text.intermediate_size,
        "gate_up": 2 * text.intermediate_size,
    }
