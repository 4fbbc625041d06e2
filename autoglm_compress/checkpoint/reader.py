"""Reading a checkpoint lazily: one tensor at a time, checked before hours of work are built on it."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open

from autoglm_compress.architecture import Family, ModelShape, family_of
from autoglm_compress.architecture.shape import BYTES_PER_ELEMENT
from autoglm_compress.checkpoint.quantized_format import format_of
from autoglm_compress.checkpoint.safetensors_header import TensorInfo, read_header
from autoglm_compress.checkpoint.tokenizer import load_tokenizer, sidecars
from autoglm_compress.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
ELEMENTS_AT_ONCE = 1 << 24
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Checkpoint:
    """A folder with `config.json`, a tokenizer and safetensors, opened for reading.

    Opening reads the config and the headers of the weight files only, and checks that every tensor the family asks
    for is there with the shape the config implies.

    Raises:
        UserError: the folder is not a complete checkpoint of a supported family.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family: Family = family_of(self.config, str(folder / "config.json"))
        self.infos = _locate_tensors(folder)
        self.format = format_of(self.config, str(folder / "config.json"))
        self._stamps = {file: _stamp(file) for file in self.files()}
        self._check_tensors()

    @cached_property
    def model_config(self) -> Any:
        """The `transformers` config object, with the defaults that `config.json` leaves out."""
        return load_model_config(self.folder)

    def unquantized_config(self) -> Any:
        """A copy of the config for a model of plain weights, to be changed at will."""
        config = deepcopy(self.model_config)
        config.quantization_config = None
        return config

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape."""
        shape = ModelShape.of(self.family, self.model_config)
        if self.format is None:
            return shape
        described, where = self.config["quantization_config"], str(self.folder / "config.json")
        return replace(shape, quantization=self.format.read_quantization(shape, described, where))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the unquantized weights, read off the embedding."""
        return self.infos[self.family.embedding].dtype

    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return sorted({info.file for info in self.infos.values()})

    def tokenizer_files(self) -> list[Path]:
        """Everything beside config and weights that belongs to the model: tokenizer, chat templates, generation."""
        return sidecars(self.folder)

    def require_tokenizer(self) -> None:
        """Raise UserError if the folder has no tokenizer that loads."""
        self.tokenizer()

    def tokenizer(self) -> Any:
        """The tokenizer; remote code is never run."""
        return load_tokenizer(self.folder)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype; a packed weight comes back dequantized.

        The memory may be shared with the next read of the same tensor: do not change it in place.

        Raises:
            UserError: the tensor holds NaN or infinity, or its file is not what it was when the checkpoint was opened.
        """
        if name not in self.infos:
            module = name.removesuffix(".weight")
            scheme = self.shape.quantization.schemes[module]
            return self.format.dequantize(module, scheme, self._read_stored, self.dtype)
        return self._read_stored(name)

    def read_integers(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integers [out, in], scales [out, groups] and zero points [out, groups] of a quantized linear."""
        return self.format.unpack(module, self.shape.quantization.schemes[module], self._read_stored)

    def _read_stored(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        self.require_unchanged(info.file)
        # A handle that stayed open would keep every page ever read of its file resident.
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if bad := _not_finite(tensor):
            raise UserError(
                f"{info.file}: tensor {name} has {bad} NaN or infinite values of {tensor.numel()}. "
                "The weights are damaged: download or export the model again."
            )
        self.require_unchanged(info.file)  # all of the tensor was looked at by now
        return tensor

    def require_unchanged(self, *files: Path) -> None:
        """Raise UserError if a weight file (any, if none are named) was replaced since the checkpoint was opened."""
        for file in files or self._stamps:
            try:
                changed = _stamp(file) != self._stamps[file]
            except FileNotFoundError:
                raise UserError(
                    f"{file}: gone, after it was there at the start. Put it back and give the same command again: "
                    "what is finished stays."
                ) from None
            if changed:
                raise UserError(
                    f"{file}: changed while it was being read. Give the same command again when nothing writes to it: "
                    "what was made from other contents is done again."
                )

    def read_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer, by their names relative to it."""
        prefix = self.family.layer_prefix(layer)
        return {name: self.read(prefix + name) for name in self.shape.layer_tensors()}

    def head_weight(self) -> torch.Tensor:
        """The output matrix [vocab, hidden]: the embedding where the two are tied."""
        return self.read(self.family.embedding if self.shape.tie_word_embeddings else self.family.head)

    def _check_tensors(self) -> None:
        problems = []
        schemes = self.shape.quantization.schemes if self.format else {}
        for weight, size in self.shape.tensors():
            module = weight.removesuffix(".weight")
            packed = module in schemes and weight not in self.infos
            stored = self.format.stored_shapes(module, schemes[module], size) if packed else {weight: size}
            for name, expected in stored.items():
                info = self.infos.get(name)
                if info is None:
                    problems.append(f"{name}: missing")
                    continue
                if info.shape != expected:
                    problems.append(f"{name}: shape {list(info.shape)}, expected {list(expected)} from config.json")
                if not packed and not info.dtype.is_floating_point:
                    kind = str(info.dtype).removeprefix("torch.")
                    problems.append(f"{name}: {kind}, expected floating-point numbers")
        if problems:
            shown = "\n  ".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(f"{self.folder}: tensors do not fit {self.family.architecture} as configured:\n  {shown}")


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written to or replaced."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary.

    Raises:
        UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder with config.json and safetensors.")
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
    return config


def load_model_config(folder: Path) -> Any:
    """The `transformers` config object of a folder; remote code is never run.

    Raises:
        UserError: `transformers` refuses it, or a size or the dtype in it cannot be.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        raise UserError(f"{path}: transformers cannot read it: {' '.join(str(error).split())}") from None
    for size in SIZES:
        given = getattr(config, size, None)
        if not isinstance(given, int) or given < 1:
            raise UserError(f"{path}: {size}: given {given!r}: expected a whole number from 1.")
    if config.num_attention_heads % config.num_key_value_heads:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        raise UserError(f"{path}: {heads} num_attention_heads are not divisible by {groups} num_key_value_heads.")
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in BYTES_PER_ELEMENT:
        raise UserError(f"{path}: dtype: given {dtype}: expected one of {', '.join(BYTES_PER_ELEMENT)}.")
    return config


def _locate_tensors(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    if index.exists():
        return _locate_by_index(folder, index)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder}: the weights are pickle files, which can run code when opened, and are refused. "
            "Convert them with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
        )
    raise UserError(f"{folder}: no weights: expected {INDEX} or {SINGLE}.")


def _locate_by_index(folder: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        shards = [None]
    if not all(isinstance(shard, str) for shard in shards):
        raise UserError(f'{index}: expected a JSON object with "weight_map": {{tensor: file}}.')
    infos: dict[str, TensorInfo] = {}
    for shard in shards:
        # A hub snapshot links its files to a blob store, so the check is on the name, not on where a link leads.
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: names the file {shard!r}: only .safetensors files beside the index are read.")
        if not (folder / shard).is_file():
            count = sum(1 for file in weight_map.values() if file == shard)
            raise UserError(f"{folder}: missing shard {shard}, which the index says holds {count} tensors.")
        infos.update(read_header(folder / shard))
    absent = sorted(set(weight_map) - set(infos))
    if absent:
        raise UserError(f"{index}: {weight_map[absent[0]]} does not hold the tensor {absent[0]} it is said to hold.")
    return infos


def _not_finite(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    # The extremes show both and are found sixty times as fast as single values are looked at; NaN outweighs all.
    if torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(ELEMENTS_AT_ONCE))
