"""A model as its `config.json` describes it, with no weights at hand or none read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import Family, ModelShape, Tower, family_of
from autoglm_compress.architecture.shape import name_of
from autoglm_compress.checkpoint.model_config import first_layers, load_config, read_config, text_config
from autoglm_compress.checkpoint.plain_model import meta_model
from autoglm_compress.checkpoint.safetensors_header import TensorInfo
from autoglm_compress.checkpoint.tied_head import has_own_head
from autoglm_compress.checkpoint.weight_files import has_weights, locate_tensors
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
    infos = _infos(folder)
    if has_own_head(infos, family, config):
        config.tie_word_embeddings = False
    text = text_config(config, family, where)
    shape = ModelShape.of(family, text)
    if family.embedding in infos:
        shape = replace(shape, dtype=name_of(infos[family.embedding].dtype))
    towers = _towers(infos, shape, config, where)
    return DescribedModel(replace(shape, kept=towers, first_layers=first_layers(config, family)), config, text)


def _infos(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the weight files, none if the files are not there or not complete: a download may go on later."""
    try:
        return locate_tensors(folder) if has_weights(folder) else {}
    except UserError:
        return {}


def _towers(infos: Mapping[str, TensorInfo], shape: ModelShape, config: Any, where: str) -> tuple[Tower, ...]:
    """The kept towers, by the weights' headers if they are there, otherwise by the model `transformers` builds."""
    family = shape.family
    if not family.kept:
        return ()
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    if infos:
        for name, info in infos.items():
            tower = family.place(name).tower
            parameters[tower] += prod(info.shape)
            sizes[tower] += info.nbytes
    else:
        try:
            model = meta_model(config, family.auto_class)
        except Exception as error:  # whatever in the config this version of transformers does not have
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: transformers cannot build the model to say its size: {reason}") from None
        for name, tensor in model.state_dict().items():
            tower = _tower_of_module(name, family)
            parameters[tower] += tensor.numel()
            sizes[tower] += tensor.numel() * shape.element_bytes
    return tuple(Tower(name, parameters[name], sizes[name]) for name in family.kept)


def _tower_of_module(name: str, family: Family) -> str:
    """The tower of a tensor by the name it has in a model: some have one more word before it than on disk."""
    found = [family.place(name).tower, family.place(name.removeprefix("model.")).tower]
    return next((tower for tower in found if tower in family.kept), found[0])
