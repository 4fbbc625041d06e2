"""Which files hold the weights: what transformers would load, or a word on what the folder is."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_compress.checkpoint import Checkpoint
from support.command_line import assert_says, plan, refusal
from support.running import compress, invoke, load, logits, write_recipe

INDEX = "model.safetensors.index.json"
SHARDS = {"model-00001-of-00002.safetensors": "embed_tokens", "model-00002-of-00002.safetensors": ""}


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return copytree(make_checkpoint("llama"), tmp_path / "source")


def split(folder: Path) -> None:
    """Write the weights as two shards with an index, beside the single file."""
    left, weight_map = load_file(folder / "model.safetensors"), {}
    for file, part in SHARDS.items():
        tensors = {name: left.pop(name) for name in list(left) if part in name}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_two_sets_of_weights_are_refused(folder: Path):
    split(folder)
    assert_says(refusal("inspect", folder), folder, "model.safetensors,", INDEX, *SHARDS, "Delete the set")


def test_a_stale_index_beside_a_whole_file_is_no_reason_to_refuse(folder: Path):
    split(folder)
    for shard in SHARDS:
        (folder / shard).unlink()
    assert {info.file.name for info in Checkpoint(folder).infos.values()} == {"model.safetensors"}
    (folder / INDEX).write_text("{")
    assert Checkpoint(folder).files() == [folder / "model.safetensors"]


def test_an_index_may_name_the_single_file(folder: Path):
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert len(Checkpoint(folder).infos) == len(names)


def test_shards_may_stand_in_folders_beside_the_index(folder: Path, tokens: torch.Tensor, tmp_path: Path):
    split(folder)
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / INDEX).read_text())
    for shard, moved in zip(SHARDS, ("one/a.safetensors", "two/deep/b.safetensors"), strict=True):
        (folder / moved).parent.mkdir(parents=True)
        (folder / shard).rename(folder / moved)
        index["weight_map"] = {name: moved if file == shard else file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert_says(invoke("inspect", folder, "--json").output, "one/a.safetensors", "two/deep/b.safetensors")
    kept = compress(tmp_path / "kept", folder, {"stage": "depth", "layers": [0, 1, 2, 3]})
    torch.testing.assert_close(logits(load(kept), tokens), logits(load(folder), tokens), rtol=0, atol=0)


def test_an_adapter_is_named_with_its_base(folder: Path, tmp_path: Path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    for command in (("inspect", folder), ("plan", write_recipe(tmp_path, folder, [{"stage": "tie"}]))):
        assert_says(refusal(*command), folder, "an adapter of owner/base", "Merge it first", "merge_and_unload")
    for file in folder.iterdir():
        if file.name != "adapter_config.json":
            file.unlink()
    assert_says(refusal("inspect", folder), "an adapter of owner/base")


def test_a_folder_of_gguf_files_is_named(tmp_path: Path):
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    assert_says(refusal("inspect", tmp_path), tmp_path, "GGUF files (model-Q4_0.gguf)", "gguf_file")


def test_a_download_that_is_not_finished_is_named(folder: Path):
    (folder / "model.safetensors").unlink()
    assert_says(refusal("inspect", folder), folder, "no weights", "finish it: hf download")


def test_a_download_that_is_not_finished_can_be_planned(folder: Path, tmp_path: Path):
    """A run goes on with the download only when it has a plan."""
    split(folder)
    (folder / "model.safetensors").unlink()
    for shard in list(SHARDS)[1:]:
        (folder / shard).unlink()
    assert plan(write_recipe(tmp_path, folder, [{"stage": "depth", "layers": [0]}]))["checkpoints"][0]["bytes"]


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_that_predicts_no_tokens_is_named(folder: Path, name: str):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    assert_says(refusal("inspect", folder), f"{name} does not predict next tokens", "LlamaForCausalLM")
