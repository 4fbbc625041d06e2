"""The weight files of a folder: which there are, and which tensors they hold, from their headers."""

import json
from pathlib import Path, PurePosixPath

from autoglm_compress.checkpoint.safetensors_header import TensorInfo, read_header
from autoglm_compress.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def has_weights(folder: Path) -> bool:
    """Whether there are weight files, and not only a config as `plan` downloads it."""
    return any(folder.glob("*.safetensors"))


def stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written to or replaced."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def locate_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder's weight files by name, from the files' headers.

    Raises:
        UserError: there are no such files, or they are not complete.
    """
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
