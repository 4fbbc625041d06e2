"""The weight files of a folder: which there are, and which tensors they hold, from their headers."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from autoglm_compress.architecture import Family
from autoglm_compress.atomic import read_object
from autoglm_compress.checkpoint.safetensors_header import TensorInfo, read_header
from autoglm_compress.errors import UserError, listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def has_weights(folder: Path) -> bool:
    """Whether there are weight files. `plan` downloads only the config."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).exists()


def stamp(file: Path) -> tuple[int, int]:
    """A stamp of a file that changes when the file is written to or replaced."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def require_whole_model(folder: Path) -> None:
    """Raise UserError if a folder does not hold a model, or holds an adapter that would change it."""
    adapter = folder / ADAPTER
    if adapter.exists():
        base = read_object(adapter).get("base_model_name_or_path") or "its base model"
        raise UserError(
            f"{folder}: holds an adapter of {base} ({ADAPTER}), which transformers applies to the weights. Merge it "
            "first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(…). If the weights are "
            "merged already, delete the adapter's files."
        )
    converted = sorted(path.name for path in folder.glob("*.gguf"))
    if converted and not has_weights(folder):
        raise UserError(
            f"{folder}: GGUF files ({listed(converted)}), and no safetensors. Give the model that they were made from, "
            "or convert one: AutoModelForCausalLM.from_pretrained(folder, gguf_file=…).save_pretrained(…)."
        )


def locate_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder's weight files by name, from the files' headers.

    Raises:
        UserError: there are no such files, or they are not complete.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        # transformers looks for the single file first; an index whose shards are gone changes nothing.
        others = [shard for shard in _shards(index) if shard != SINGLE and (folder / shard).is_file()]
        if others:
            raise UserError(
                f"{folder}: two sets of weights: {SINGLE}, which transformers would load, and {len(others)} files that "
                f"{INDEX} names ({listed(others)}). Delete the set that is not the model's, with its index."
            )
        return read_header(single)
    if index.exists():
        return _locate_by_index(folder, index)
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder}: the weights are pickle files, which can run code when opened, and are refused. "
            "Convert them with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
        )
    raise UserError(
        f"{folder}: no weights: expected {INDEX} or {SINGLE}. If the folder is a hub download, finish it: "
        "hf download OWNER/NAME."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says.

    Raises:
        UserError: the index is not JSON, or says something else.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        whole = all(isinstance(name, str) and isinstance(file, str) for name, file in found.items())
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise UserError(f'{index}: expected a JSON object with "weight_map": {{tensor: file}}.')
    return found


def _shards(index: Path) -> list[str]:
    """The files that an index names, none if it is not there or cannot be read."""
    try:
        return sorted(set(_weight_map(index).values()))
    except (OSError, UserError):
        return []


def _locate_by_index(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    infos: dict[str, TensorInfo] = {}
    for shard in shards:
        # A hub snapshot links its files to a blob store, so the check is on the name, not on where a link leads.
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or path.suffix != ".safetensors":
            expected = "only .safetensors files beside the index, or in folders beside it, are read"
            raise UserError(f"{index}: names the file {shard!r}: {expected}.")
        if not (folder / shard).is_file():
            count = sum(1 for file in weight_map.values() if file == shard)
            raise UserError(f"{folder}: missing shard {shard}, which the index says holds {count} tensors.")
        infos.update(read_header(folder / shard))
    absent = sorted(set(weight_map) - set(infos))
    if absent:
        raise UserError(f"{index}: {weight_map[absent[0]]} does not hold the tensor {absent[0]} it is said to hold.")
    return infos


def part_of(infos: Mapping[str, TensorInfo], family: Family) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """A model's tensors by their names in it, where files hold a larger model, and the names of the other parts."""
    prefix = family.within.prefix if family.within else ""
    if not prefix or not any(name.startswith(prefix) for name in infos):
        return dict(infos), ()
    own = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    others = {f"{name.partition('.')[0]}.*" for name in infos if not name.startswith(prefix)}
    return own, tuple(sorted(others))
