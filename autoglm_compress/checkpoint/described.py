"""A model as its `config.json` describes it. Weights are not read and need not be there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import Family, ModelShape, Tower, family_of, towers_of
from autoglm_compress.architecture.family import TEXT
from autoglm_compress.architecture.shape import name_of
from autoglm_compress.checkpoint.model_config import (
    first_layers,
    has_shared_adapter,
    load_config,
    read_config,
    text_config,
)
from autoglm_compress.checkpoint.plain_model import meta_model
from autoglm_compress.checkpoint.safetensors_header import TensorInfo
from autoglm_compress.checkpoint.tied_head import has_own_head
from autoglm_compress.checkpoint.weight_files import has_weights, locate_tensors, part_of
from autoglm_compress.errors import UserError


@dataclass(frozen=True)
class DescribedModel:
    """The shape of a model, and its `transformers` config objects: the whole one, and the text tower's."""

    shape: ModelShape
    config: Any
    text_config: Any


def describe(folder: Path, family: Family | None = None) -> DescribedModel:
    """The unquantized model that a folder's `config.json` describes; `family` is as `Checkpoint` takes it.

    Raises:
        UserError: it is not supported, or is quantized.
    """
    raw, where = read_config(folder), str(folder / "config.json")
    if raw.get("quantization_config"):
        raise UserError(f"{folder}: quantized already; give the unquantized model.")
    family, config = family_of(raw, where, family), load_config(folder)
    infos, _ = part_of(_infos(folder), family)
    if has_own_head(infos, family, config):
        config.tie_word_embeddings = False
    text = text_config(config, family, where)
    shape = ModelShape.of(family, text)
    if family.embedding in infos:
        shape = replace(shape, dtype=name_of(infos[family.embedding].dtype))
    towers = _towers(infos, shape, config, where)
    shape = replace(
        shape, kept=towers, first_layers=first_layers(config, family), shared_adapter=has_shared_adapter(config)
    )
    return DescribedModel(shape, config, text)


def _infos(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the weight files. Empty if files are missing or incomplete, since a download may continue
    later.
    """
    try:
        return locate_tensors(folder) if has_weights(folder) else {}
    except UserError:
        return {}


def _towers(infos: Mapping[str, TensorInfo], shape: ModelShape, config: Any, where: str) -> tuple[Tower, ...]:
    """The kept towers, from the headers of the weight files if they exist, otherwise from the model `transformers`
    builds.
    """
    family = shape.family
    if not family.kept:
        return ()
    if infos:
        return towers_of(family, {name: (info.shape, info.nbytes) for name, info in infos.items()})
    try:
        model = meta_model(config, family.auto_class)
    except Exception as error:  # whatever in the config this version of transformers does not have
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: transformers cannot build the model to say its size: {reason}") from None
    tensors = model.state_dict().items()
    return towers_of(
        family, {_name_in_files(name, family): (tuple(t.shape), t.numel() * shape.element_bytes) for name, t in tensors}
    )


def _name_in_files(name: str, family: Family) -> str:
    """The name in files of a kept tower's tensor, by that in a model, where one more word may stand before it."""
    shorter = name.removeprefix("model.")
    return name if family.place(name).tower in family.kept or family.place(shorter).tower == TEXT else shorter
