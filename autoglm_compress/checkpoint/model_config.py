"""The `config.json` of a checkpoint: as JSON, as `transformers` reads it, and the part that describes the text
tower.
"""

import json
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import Family, family_within
from autoglm_compress.architecture.family import ROOT
from autoglm_compress.architecture.shape import BYTES_PER_ELEMENT, name_of
from autoglm_compress.architecture.sizes_in_config import SHARED_ADAPTER
from autoglm_compress.checkpoint.weight_files import require_whole_model
from autoglm_compress.errors import UserError

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary, or the part of it for the one part of a larger model that is supported.

    Raises:
        UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder with config.json and safetensors.")
    require_whole_model(folder)
    if not path.exists():
        raise UserError(f"{folder}: no config.json: not a model checkpoint. Give the folder that holds it.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: architectures: given {names!r}: expected a list of names.")
    family = family_within(names or ())
    if family is None or family.within is None:
        return config
    part = config.get(family.within.config)
    if not isinstance(part, dict):
        raise UserError(f"{path}: {family.within.config}: missing: {family.architecture} is described there.")
    dtype = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    return dtype | part | {"architectures": [family.architecture]}


def load_config(folder: Path) -> Any:
    """The `transformers` config object of what `read_config` gives; remote code is never run.

    Raises:
        UserError: `transformers` refuses it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        path = folder / "config.json"
        raise UserError(f"{path}: transformers cannot read it: {' '.join(str(error).split())}") from None
    family = family_within(config.architectures or ())
    if family is None or family.within is None:
        return config
    part = getattr(config, family.within.config)
    part.dtype = part.dtype or config.dtype
    part.architectures = [family.architecture]
    return part


def text_config(config: Any, family: Family, where: str) -> Any:
    """The config object of the text tower: the whole config, or a copy of its part with the settings outside it added.

    Raises:
        UserError: there is no such part, or a size, a list or the dtype in it is not valid.
    """
    text: Any = config
    if family.config != ROOT:
        text = deepcopy(getattr(config, family.config, None))
        if not hasattr(text, "to_dict"):
            expected = f"{family.architecture} has the text tower's sizes there"
            raise UserError(f"{where}: {family.config}: missing: {expected}.")
        text.tie_word_embeddings = is_tied(config)
        text.dtype = text.dtype or config.dtype
    inside = "" if family.config == ROOT else f"{family.config}."
    for size in SIZES:
        given = getattr(text, size, None)
        if not isinstance(given, int) or given < 1:
            raise UserError(f"{where}: {inside}{size}: given {given!r}: expected a whole number from 1.")
    if text.num_attention_heads % text.num_key_value_heads:
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        raise UserError(f"{where}: {heads} num_attention_heads are not divisible by {groups} num_key_value_heads.")
    dtype = name_of(text.dtype)
    if dtype not in BYTES_PER_ELEMENT:
        raise UserError(f"{where}: dtype: given {dtype}: expected one of {', '.join(BYTES_PER_ELEMENT)}.")
    if family.layer_kinds:
        _check_kinds(getattr(text, family.layer_kinds, None), text.num_hidden_layers, family, where, inside)
    return text


def is_tied(config: Any) -> bool:
    """Whether the whole `transformers` config object says that head and embedding are one; some cannot say so."""
    return bool(getattr(config, "tie_word_embeddings", False))


def has_shared_adapter(config: Any) -> bool:
    """Whether the whole `transformers` config object says that images and sounds share an adapter."""
    return bool(getattr(config, SHARED_ADAPTER, False))


def first_layers(config: Any, family: Family) -> int:
    """How many of the first layers a tower adds to the residual stream after, besides the embeddings.

    `config` is the whole `transformers` config object.
    """
    if family.first_layers is None:
        return 0
    return len(reduce(lambda part, name: getattr(part, name, ()), family.first_layers.split("."), config))


def _check_kinds(given: Any, layers: int, family: Family, where: str, inside: str) -> None:
    known = sorted({kind for tensor in family.layer_tensors.values() for kind in tensor.kinds or ()})
    if not isinstance(given, list) or len(given) != layers or not all(kind in known for kind in given):
        raise UserError(
            f"{where}: {inside}{family.layer_kinds}: given {given!r}: expected a list of {layers} kinds of layers, "
            f"each one of those that the family's layer_tensors name: {', '.join(known)}."
        )
