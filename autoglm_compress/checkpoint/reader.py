"""Reading a checkpoint lazily, one tensor at a time. Names and shapes are checked when it is opened."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from autoglm_compress.architecture import Family, ModelShape, Scheme, Tower, family_of, packed_linears, towers_of
from autoglm_compress.architecture.shape import BYTES_PER_ELEMENT, matrix_shape, name_of
from autoglm_compress.architecture.sizes_in_config import lists_per_layer, untied
from autoglm_compress.attention.settings import SparseAttention
from autoglm_compress.checkpoint.finite import not_finite
from autoglm_compress.checkpoint.model_config import (
    first_layers,
    has_shared_adapter,
    load_config,
    read_config,
    text_config,
)
from autoglm_compress.checkpoint.plain_model import loaded_names, meta_model
from autoglm_compress.checkpoint.quantized_format import QuantizedFormat, format_of
from autoglm_compress.checkpoint.tied_head import has_own_head
from autoglm_compress.checkpoint.tokenizer import load_tokenizer, sidecars
from autoglm_compress.checkpoint.weight_files import locate_tensors, part_of, stamp
from autoglm_compress.errors import UserError, listed, nearest

NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps")


class TowerFeatures(Protocol):
    """What a checkpoint's towers make of images and sounds, by the ids of tokens past the vocabulary."""

    def embedded(self, rows: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Rows [rows, length] of ids as an embedding [vocab_size, hidden_size] and the towers give them."""

    def arguments(self, rows: torch.Tensor, layer: int | None = None) -> dict[str, Any]:
        """What a `transformers` decoder, of one layer or of all, takes beside the embeddings of rows of ids."""

    def of(self, checkpoint: "Checkpoint", changed: Mapping[str, torch.Tensor] | None = None) -> "TowerFeatures":
        """The same of another checkpoint's towers, some of their tensors changed."""

    def chats_in(self, ids: torch.Tensor) -> list[int]:
        """The numbers of the chats that have features among some ids of any shape, in order."""

    def watch(
        self, chats: Iterable[int], watchers: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]
    ) -> Iterator[int]:
        """Let the towers see chats once more; watchers are told the inputs and the outputs of modules, by name."""


class Checkpoint:
    """A folder with `config.json`, a tokenizer and safetensors, opened for reading.

    Opening reads the config and the headers of the weight files only, and checks that every tensor the family asks
    for is there with the shape the config implies. Tensors that the family does not know are looked up in the model
    that `transformers` builds: `left_out` are the names of those that this model does not use either. Of a larger model
    that the family's is a part of, nothing else is read; `left_out` then names the other parts too.

    Args:
        folder: the folder.
        family: describes the checkpoint, instead of the known family of its architecture.

    Raises:
        UserError: the folder is not a complete checkpoint of a supported family, or has tensors that plain
            `transformers` would load and the family does not know.
    """

    def __init__(self, folder: Path | str, family: Family | None = None) -> None:
        self.folder = folder = Path(folder)
        self.config = read_config(folder)
        self.family: Family = family_of(self.config, str(folder / "config.json"), family)
        self.infos, outside = part_of(locate_tensors(folder), self.family)
        self.format = format_of(self.config, str(folder / "config.json"))
        self._stamps = {file: stamp(file) for file in self.files()}
        if has_own_head(self.infos, self.family, self.whole_config):
            self.config = untied(self.config, self.family)
            self.whole_config.tie_word_embeddings = False
        known = self._check_tensors()
        self.left_out = self._unused(set(self.infos) - known) + outside
        self.features: TowerFeatures | None = None
        """What its towers make of the images and sounds of a run, where there are any."""
        self.attention: SparseAttention | None = None
        """How few tokens walks let its attention read; None for all."""

    @cached_property
    def whole_config(self) -> Any:
        """The `transformers` config object, with the defaults that `config.json` leaves out."""
        return load_config(self.folder)

    @cached_property
    def model_config(self) -> Any:
        """The `transformers` config object of the text tower, which may be the whole one."""
        return text_config(self.whole_config, self.family, str(self.folder / "config.json"))

    @cached_property
    def lists_per_layer(self) -> dict[str, list[Any]]:
        """The settings of the text tower that have an entry for each layer."""
        found = {name: getattr(self.model_config, name, None) for name in lists_per_layer(self.family)}
        return {name: entries for name, entries in found.items() if entries}

    @property
    def norm_eps(self) -> float:
        """The epsilon that norms add to a mean square.

        Raises:
            UserError: the config calls it by none of the names in NORM_EPS.
        """
        found = (getattr(self.model_config, name, None) for name in NORM_EPS)
        eps = next((value for value in found if value is not None), None)
        if eps is None:
            raise UserError(f"{self.folder / 'config.json'}: none of {', '.join(NORM_EPS)}: give the norms' epsilon.")
        return eps

    def whole_unquantized_config(self) -> Any:
        """A copy of the whole config, for a model of plain weights. The caller may change it."""
        config = deepcopy(self.whole_config)
        config.quantization_config = None
        return config

    def unquantized_config(self) -> Any:
        """A copy of the text tower's config, for a model of plain weights. The caller may change it."""
        config = deepcopy(self.model_config)
        config.quantization_config = None
        return config

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape."""
        shape = replace(
            ModelShape.of(self.family, self.model_config),
            kept=self._towers(),
            first_layers=first_layers(self.whole_config, self.family),
            dtype=self._stored_dtype(),
            shared_adapter=has_shared_adapter(self.whole_config),
        )
        if self.format is None:
            return shape
        described, where = self.config["quantization_config"], str(self.folder / "config.json")
        return replace(shape, quantization=self.format.read_quantization(shape, described, where))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the unquantized weights, read off the embedding."""
        return self.dtype_of(self.family.embedding)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that one of the text tower's tensors is stored in."""
        dtype = self.infos[name].dtype
        assert isinstance(dtype, torch.dtype)  # opening refuses those that have only a name
        return dtype

    def _stored_dtype(self) -> str:
        """The stored dtype of the embedding, whatever config.json says. If there is no embedding, the dtype in
        config.json.
        """
        info = self.infos.get(self.family.embedding)
        return name_of(info.dtype if info else self.model_config.dtype)

    @cached_property
    def kept_tensors(self) -> dict[str, tuple[str, ...]]:
        """The tensors of each tower that stages keep as it is, by the tower's name."""
        placed = [(self.family.place(name).tower, name) for name in self.infos]
        return {tower: tuple(name for place, name in placed if place == tower) for tower in self.family.kept}

    def kept_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the kept towers with their names, packed ones dequantized."""
        packed = packed_linears(self.shape.kept)
        for module in packed:
            assert self.format is not None  # nothing is packed without
            assert self.shape.quantization is not None
            layout, scheme = self.format, self.shape.quantization.towers[module]
            yield f"{module}.weight", layout.dequantize(module, scheme, self._read_stored, self.dtype)
        for names in self.kept_tensors.values():
            for name in names:
                if name.rpartition(".")[0] not in packed or name.endswith(".bias"):
                    yield name, self._read_stored(name)

    def _towers(self) -> tuple[Tower, ...]:
        return towers_of(self.family, {name: (info.shape, info.nbytes) for name, info in self.infos.items()})

    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return sorted({info.file for info in self.infos.values()})

    def tokenizer_files(self) -> list[Path]:
        """The model's files besides config and weights: tokenizer, chat templates, generation settings."""
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
            UserError: there is no such tensor, it holds NaN or infinity, or its file has changed since the checkpoint
                was opened.
        """
        if name in self.infos:
            return self._read_stored(name)
        module = name.removesuffix(".weight")
        if module not in self.shape.schemes:
            known = [*self.infos, *(f"{packed}.weight" for packed in self.shape.schemes)]
            raise UserError(f"{self.folder}: no tensor {name!r}: {nearest(name, known)}")
        layout, scheme = self.packing_of(module)
        return layout.dequantize(module, scheme, self._read_stored, self.dtype)

    def read_integers(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integers [out, in], scales [out, groups] and zero points [out, groups] of a quantized linear."""
        layout, scheme = self.packing_of(module)
        return layout.unpack(module, scheme, self._read_stored)

    def packing_of(self, module: str) -> tuple[QuantizedFormat, Scheme]:
        """How a quantized linear is stored.

        Raises:
            UserError: there is no such linear, or it is not quantized.
        """
        if self.format is None:
            raise UserError(f"{self.folder}: no quantized linear {module!r}: the checkpoint is not quantized.")
        if module not in self.shape.schemes:
            raise UserError(f"{self.folder}: no quantized linear {module!r}: {nearest(module, self.shape.schemes)}")
        return self.format, self.shape.schemes[module]

    def _read_stored(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        self.require_unchanged(info.file)
        # An open handle would keep every page that was read from its file resident.
        with safe_open(info.file, framework="pt") as file:
            tensor = file.get_tensor(info.name)
        if bad := not_finite(tensor):
            raise UserError(
                f"{info.file}: tensor {name} has {bad} NaN or infinite values of {tensor.numel()}. "
                "The weights are damaged: download or export the model again."
            )
        self.require_unchanged(info.file)  # the whole tensor has been checked by now
        return tensor

    def require_unchanged(self, *files: Path) -> None:
        """Raise UserError if a weight file (any, if none are named) was replaced since the checkpoint was opened."""
        for file in files or self._stamps:
            try:
                changed = stamp(file) != self._stamps[file]
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
        return {name: self.read(prefix + name) for name in self.shape.layer_tensors(layer)}

    def head_weight(self) -> torch.Tensor:
        """The output matrix [vocab, hidden]: the embedding where the two are tied."""
        return self.read(self.family.embedding if self.shape.tie_word_embeddings else self.family.head)

    def _check_tensors(self) -> set[str]:
        """Raise UserError if a tensor does not fit. Returns the names of all tensors that the family knows."""
        problems = [
            f"{self.family.kept[tower]}*: missing, all of the tower {tower!r}"
            for tower, names in self.kept_tensors.items()
            if not names
        ]
        known = {self.family.head}.union(*self.kept_tensors.values())
        for weight, size in self.shape.tensors():
            module = weight.removesuffix(".weight")
            packed = module in self.shape.schemes and weight not in self.infos
            stored = {weight: size}
            if packed:
                layout, scheme = self.packing_of(module)
                stored = layout.stored_shapes(module, scheme, matrix_shape(size))
            known |= stored.keys()
            for name, expected in stored.items():
                info = self.infos.get(name)
                if info is None:
                    problems.append(f"{name}: missing")
                    continue
                if info.shape != expected:
                    problems.append(f"{name}: shape {list(info.shape)}, expected {list(expected)} from config.json")
                if not packed and name_of(info.dtype) not in BYTES_PER_ELEMENT:
                    kinds = ", ".join(BYTES_PER_ELEMENT)
                    problems.append(f"{name}: {name_of(info.dtype)}, expected floating-point numbers: {kinds}")
        if problems:
            shown = "\n  ".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(f"{self.folder}: tensors do not fit {self.family.architecture} as configured:\n  {shown}")
        return known

    def _unused(self, unknown: set[str]) -> tuple[str, ...]:
        """The tensors that neither the family nor the model uses.

        Raises:
            UserError: plain `transformers` would load some of them.
        """
        if not unknown:
            return ()
        try:
            model = meta_model(self.whole_unquantized_config(), self.family.auto_class)
        except Exception as error:  # whatever in the config this version of transformers does not have
            reason = f"transformers cannot build the model to say what they are: {type(error).__name__}: {error}"
            raise UserError(f"{self.folder}: unknown tensors: {listed(unknown)}: {reason}") from None
        if loaded := loaded_names(model, unknown):
            raise UserError(
                f"{self.folder}: tensors that transformers would load but that {self.family.architecture} is not "
                f"known to have here: {listed(loaded)}. Check the config, or describe the family that has them."
            )
        return tuple(sorted(unknown))
