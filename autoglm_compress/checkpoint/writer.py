"""Writing a checkpoint in pieces that survive a kill. One rename turns them into a complete folder."""

import os
import re
import shutil
from collections.abc import Callable, Collection
from errno import EIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autoglm_compress.atomic import appearing, read_object, write_json
from autoglm_compress.checkpoint.finite import not_finite
from autoglm_compress.checkpoint.reader import Checkpoint
from autoglm_compress.checkpoint.safetensors_header import read_header
from autoglm_compress.checkpoint.weight_files import INDEX
from autoglm_compress.errors import UserError
from autoglm_compress.memory import give_back_freed_memory

SHARD_BYTES = 256 << 20
METADATA = {"format": "pt"}
AUTO_MAP = "auto_map"
"""The field of a config that names classes in .py files beside it."""


class CheckpointWriter:
    """Collects a checkpoint in a folder of its own until `finish` makes shards of it.

    The pieces are *units*, numbered in the order of the model: unit 0 holds the tensors before the layers, then comes
    one unit per layer, then one for the tensors after them. `finish` adds units for the towers that are kept as they
    are. A unit is on disk whole or not at all, so a killed stage continues with the first missing unit.
    """

    def __init__(self, folder: Path, units: int) -> None:
        self.folder = folder
        self.units = units
        folder.mkdir(parents=True, exist_ok=True)
        remove_half_written(folder)

    def _unit(self, number: int) -> Path:
        return self.folder / f"unit-{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a unit was written, in this process or by one that was killed."""
        return self._unit(number).exists() or self._sealed

    @property
    def _sealed(self) -> bool:
        return (self.folder / INDEX).exists()

    def write(self, number: int, tensors: dict[str, torch.Tensor], same_as: Checkpoint | None = None) -> None:
        """Write one unit. The file appears under its name only when it is complete.

        `same_as` is a checkpoint by this package with the same tensors, or None. If one of its shards holds exactly
        these tensors, the shard is hard-linked instead of copied.
        """
        for name, tensor in tensors.items():
            if bad := not_finite(tensor):
                raise UserError(f"{name}: {bad} of {tensor.numel()} values would be NaN or infinite{_cure(tensor)}")
        shard = None if same_as is None else _shard_of(same_as, tensors)
        if shard is None or not _link(shard, self._unit(number)):
            save_atomically(self._unit(number), tensors)

    def finish(
        self,
        config: dict[str, Any],
        like: Checkpoint,
        make_kept: Callable[[str], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Turn the units into shards with an index, and add config, tokenizer files and kept towers of `like`.

        `make_kept` gives what is written for each of the kept towers' tensors of `like`, if not the tensor itself.
        """
        give_back_freed_memory()
        make_kept = make_kept or (lambda name: {name: like.read(name)})
        for path in like.tokenizer_files():
            copy = self.folder / path.relative_to(like.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy_without_code(path, copy)
        write_json(self.folder / "config.json", {name: value for name, value in config.items() if name != AUTO_MAP})
        kept = _kept_units(like)
        units = [self._unit(number) for number in range(self.units + len(kept))]
        for number, names in enumerate(kept, self.units):
            if not self.has(number):
                self.write(number, {new: tensor for name in names for new, tensor in make_kept(name).items()})
        if not self._sealed:
            self._make_shards(units)
        for unit in units:
            unit.unlink(missing_ok=True)

    def _make_shards(self, units: list[Path]) -> None:
        """Combine units into shards of at least SHARD_BYTES. The index is written last; without it the shards do not
        count.
        """
        groups = _grouped(units)
        weight_map: dict[str, str] = {}
        total = 0
        for number, group in enumerate(groups, 1):
            shard = self.folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            infos = {name: info for unit in group for name, info in read_header(unit).items()}
            weight_map |= dict.fromkeys(infos, shard.name)
            total += sum(info.nbytes for info in infos.values())
            if len(group) == 1:
                if not _link(group[0], shard):
                    shutil.copyfile(group[0], shard)
            else:
                save_atomically(shard, {name: tensor for unit in group for name, tensor in load_file(unit).items()})
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cure(tensor: torch.Tensor) -> str:
    """The advice about values that cannot be stored."""
    if tensor.dtype != torch.float16:
        return ": the stage has gone wrong, or the model's weights are damaged. Nothing was written."
    return (
        ": they leave the range of float16, in which the model is stored. Convert the source to bfloat16, whose range "
        "is that of float32, and run again: "
        "AutoModelForCausalLM.from_pretrained(…, dtype='bfloat16').save_pretrained(…)."
    )


def _copy_without_code(source: Path, target: Path) -> None:
    """Copy a file without its references to code. The code is not copied, and transformers would not find it."""
    found = read_object(source) if source.name.endswith("config.json") else {}
    if AUTO_MAP in found:
        write_json(target, {name: value for name, value in found.items() if name != AUTO_MAP})
    else:
        shutil.copyfile(source, target)


def _grouped(units: list[Path]) -> list[list[Path]]:
    groups: list[list[Path]] = []
    size = SHARD_BYTES
    for unit in units:
        if size >= SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.stat().st_size
    return groups


def _kept_units(source: Checkpoint) -> list[list[str]]:
    """The names of the tensors of kept towers, in parts of about SHARD_BYTES."""
    units: list[list[str]] = []
    size = SHARD_BYTES
    for name in (name for names in source.kept_tensors.values() for name in names):
        if size >= SHARD_BYTES:
            units.append([])
            size = 0
        units[-1].append(name)
        size += source.infos[name].nbytes
    return units


def _link(file: Path, name: Path) -> bool:
    """Give a file a second name, if the file system can."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(file)
    except OSError:
        return False
    return True


def _shard_of(checkpoint: Checkpoint, tensors: Collection[str]) -> Path | None:
    """The file that holds these tensors of a checkpoint and no others, if there is one."""
    files = {checkpoint.infos[name].file for name in tensors}
    held = [name for name, info in checkpoint.infos.items() if info.file in files]
    return files.pop() if len(files) == 1 and len(held) == len(tensors) else None


def share_files(source: Checkpoint, folder: Path, linked: bool) -> None:
    """Let a folder hold the same checkpoint as its source, quantized or not.

    Args:
        source: the checkpoint.
        folder: where to; it exists.
        linked: whether weight files may be shared with the source, which is then no one else's.
    """
    index = source.folder / INDEX
    for path in [*source.files(), *([index] if index.exists() else [])]:
        copy = folder / path.relative_to(source.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not (linked and _link(path, copy)):
            with appearing(copy) as temporary:
                shutil.copyfile(path, temporary)
    for path in [source.folder / "config.json", *source.tokenizer_files()]:
        copy = folder / path.relative_to(source.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy_without_code(path, copy)


def save_atomically(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that appears under its name only when it is complete and on the disk."""
    with appearing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=METADATA)
        except SafetensorError as error:
            raise _as_os_error(error, path) from None
        temporary.chmod(_usual_mode())  # safetensors lets nobody but the owner read it


def computed_once(file: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a long computation, kept in a file so that a killed stage does not repeat it."""
    if not file.exists():
        save_atomically(file, compute())
    return load_file(file)


def remove_half_written(folder: Path) -> None:
    """Delete what a killed process was writing: files under our temporary names, or under those of safetensors."""
    for path in folder.glob(".*"):
        if path.is_file():
            path.unlink()


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """The system error that safetensors reports only as text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else EIO
    return OSError(number, os.strerror(number), str(path))


def _usual_mode() -> int:
    """The permissions that a new file has."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
