"""Tensors of a file that the family does not know: what transformers would load is refused, the rest is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autoglm_compress.checkpoint import Checkpoint, plain_model
from autoglm_compress.errors import UserError
from support.command_line import assert_says, refusal
from support.running import invoke, load, run, same_tensors, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
FFN = {"stage": "ffn", "intermediate_size": 96}
WIDTH = {"stage": "width", "hidden_size": 32}
INT4 = {"stage": "quantize", "bits": 4, "group_size": 32, "method": "round_to_nearest"}
# As old Llama checkpoints have it, and layers that predict further tokens, behind the last one.
UNUSED = {
    **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)},
    "model.layers.4.eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16),
    "model.layers.4.input_layernorm.weight": torch.ones(64, dtype=torch.bfloat16),
    "mtp.norm.weight": torch.ones(64, dtype=torch.bfloat16),
}


def with_tensors(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint that has more tensors."""
    copytree(source, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def with_unused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return with_tensors(make_checkpoint("llama"), tmp_path / "source", UNUSED)


def test_what_transformers_does_not_load_is_left_out(with_unused: Path):
    _, info = AutoModelForCausalLM.from_pretrained(with_unused, output_loading_info=True)
    assert set(UNUSED) >= info["unexpected_keys"] > set()  # it says nothing of inv_freq
    assert Checkpoint(with_unused).left_out == tuple(sorted(UNUSED))


def test_nothing_is_asked_where_nothing_is_unknown(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("autoglm_compress.checkpoint.reader.meta_model", None)
    for family in ("llama", "glm4"):
        assert Checkpoint(make_checkpoint(family)).left_out == ()


def test_a_run_names_what_it_leaves_out(with_unused: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    shown = run(write_recipe(tmp_path, with_unused, [FFN, WIDTH, INT4]))
    assert_says(shown, "left out", "model.layers.0.self_attn.rotary_emb.inv_freq", "and 2 more")
    folders = stage_folders(tmp_path / "out")
    records = [json.loads((folder / "stage.json").read_text()) for folder in folders]
    assert [record.get("left_out") for record in records] == [sorted(UNUSED), None, None]
    for folder in folders:
        load(folder)  # finds every tensor it looks for, and no other
    run(write_recipe(tmp_path / "clean", make_checkpoint("llama"), [FFN, WIDTH, INT4]))
    clean = stage_folders(tmp_path / "clean/out")
    assert all(same_tensors(one, other) for one, other in zip(folders, clean, strict=True))


def test_inspect_names_what_is_left_out(with_unused: Path, make_checkpoint: MakeCheckpoint):
    assert json.loads(invoke("inspect", with_unused, "--json").output)["left_out"] == sorted(UNUSED)
    assert_says(" ".join(invoke("inspect", with_unused).output.split()), "left out", "which the model does not use")
    assert "left out" not in invoke("inspect", make_checkpoint("llama")).output


def test_a_quantized_checkpoint_has_no_unknown_tensors(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    run(write_recipe(tmp_path, make_checkpoint("glm"), [INT4 | {"head_bits": 8}]))
    [folder] = stage_folders(tmp_path / "out")
    assert Checkpoint(folder).left_out == ()
    with_more = with_tensors_in_shard(folder, {"mtp.norm.weight": UNUSED["mtp.norm.weight"]})
    assert Checkpoint(with_more).left_out == ("mtp.norm.weight",)


def with_tensors_in_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Add tensors to the first shard of a checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = min(index["weight_map"].values())
    save_file(load_file(folder / shard) | tensors, folder / shard, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_what_transformers_loads_under_another_name_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint("llama")
    again = {"embed_tokens.weight": tensors_of(source)["model.embed_tokens.weight"]} | UNUSED
    changed = with_tensors(source, tmp_path / "source", again)
    message = refusal("inspect", changed)
    assert_says(message, changed, "embed_tokens.weight", "LlamaForCausalLM", "transformers would load")
    assert "mtp" not in message


def test_what_transformers_has_and_the_family_has_not_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As if transformers' Llama had a norm that the family does not have."""
    source = with_tensors(make_checkpoint("llama"), tmp_path / "source", UNUSED)

    def newer(*arguments: object) -> torch.nn.Module:
        model = plain_model.meta_model(*arguments)
        model.add_module("mtp", torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(64, bias=False, device="meta")}))
        return model

    monkeypatch.setattr("autoglm_compress.checkpoint.reader.meta_model", newer)
    with pytest.raises(UserError, match=r"mtp\.norm\.weight\. Check"):
        Checkpoint(source)


def test_a_model_that_cannot_be_built_cannot_be_asked(with_unused: Path):
    config = (with_unused / "config.json").read_text()
    (with_unused / "config.json").write_text(config.replace('"silu"', '"newest_activation"'))
    assert_says(refusal("inspect", with_unused), with_unused, "rotary_emb.inv_freq", "and 2 more", "newest_activation")


def test_an_equal_copy_of_a_tied_head_will_do(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint("llama", tie_word_embeddings=True)
    copied = with_tensors(
        source, tmp_path / "source", {"lm_head.weight": tensors_of(source)["model.embed_tokens.weight"]}
    )
    assert Checkpoint(copied).left_out == ()
    run(write_recipe(tmp_path, copied, [FFN]))
    [folder] = stage_folders(tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(folder)
    load(folder)
