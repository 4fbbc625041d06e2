"""A model with a vision tower, described by its user: the tower goes through all stages as it is."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from support.command_line import assert_says, plan, refusal
from support.own_families import GLM4V, QWEN2VL, save_glm4v, save_qwen2vl, write_family
from support.running import invoke, run, tensors_of, write_recipe

torch.set_num_threads(1)
TOWER = "model.visual."
IDENTITY = {"stage": "depth", "num_hidden_layers": "1x"}
DEPTH = {"stage": "depth", "name": "three", "num_hidden_layers": 3}
FFN = {"stage": "ffn", "intermediate_size": 96}
TIE = {"stage": "tie"}
REFIT = {"stage": "refit", "layer_passes": 1, "logit_passes": 1}
EVALUATE = {"stage": "evaluate", "tasks": ["perplexity"]}
INT8 = {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32}
INT4 = {"stage": "quantize", "name": "int4", "from": "refit", "bits": 4, "group_size": 32, "format": "awq"}
MADE = ["01-depth", "02-three", "03-ffn", "04-tie", "05-refit", "07-int8", "08-int4"]


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_glm4v(tmp_path_factory.mktemp("glm4v"), tokenizer)


def recipe_of(folder: Path, source: Path, *stages: dict) -> Path:
    write_family(folder, GLM4V)
    return write_recipe(folder, source, stages, model={"source": str(source), "family": "my_family.yaml"})


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    recipe = recipe_of(folder, source, IDENTITY, DEPTH, FFN, TIE, REFIT, EVALUATE, INT8, INT4)
    run(recipe)
    (folder / "plan.json").write_text(invoke("plan", recipe, "--json").output)
    return folder / "out"


def tower_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(checkpoint).items() if name.startswith(TOWER)}


def load(checkpoint: Path, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("name", MADE)
def test_the_tower_stays_bit_for_bit(name: str, output: Path, source: Path):
    before, after = tower_of(source), tower_of(output / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert (output / name / "preprocessor_config.json").read_text() == '{"patch_size": 2}'


@pytest.mark.parametrize("name", [name for name in MADE if name != "08-int4"])  # awq would need gptqmodel
def test_every_checkpoint_loads_in_plain_transformers(name: str, output: Path, tokens: torch.Tensor):
    assert logits(load(output / name), tokens).isfinite().all()


def test_a_depth_stage_that_keeps_all_layers_changes_nothing(output: Path, source: Path, tokens: torch.Tensor):
    made = load(output / "01-depth")
    assert torch.equal(logits(made, tokens), logits(load(source), tokens))
    assert made.config.text_config.num_hidden_layers == 4


def test_the_quantized_model_predicts_what_the_one_before_it_does(output: Path, tokens: torch.Tensor):
    before, after = (logits(load(output / name, torch.float32), tokens) for name in ("05-refit", "07-int8"))
    assert ((after - before).norm() / before.norm()) < 0.05


def test_quantized_linears_are_those_of_the_text_tower_alone(output: Path):
    config = json.loads((output / "07-int8" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", r"re:(.*\.)?model\.visual\..*"]
    assert not [name for name in tower_of(output / "07-int8") if name.endswith("weight_packed")]
    awq = json.loads((output / "08-int4" / "config.json").read_text())["quantization_config"]
    assert awq["modules_to_not_convert"] == ["lm_head", "model.visual"]


def test_sizes_are_written_where_the_text_tower_has_its_config(output: Path, source: Path):
    before = json.loads((source / "config.json").read_text())
    after = json.loads((output / "05-refit" / "config.json").read_text())
    sizes = {"num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4}
    assert {size: after["text_config"][size] for size in sizes} == sizes
    assert (before["tie_word_embeddings"], after["tie_word_embeddings"]) == (False, True)
    assert not sizes.keys() & after.keys()
    assert after["vision_config"] == before["vision_config"]


def test_the_tower_counts_in_all_sizes(output: Path, source: Path):
    planned = {entry["name"]: entry for entry in json.loads((output.parent / "plan.json").read_text())["checkpoints"]}
    tower = tower_of(source)
    parameters = sum(tensor.numel() for tensor in tower.values())
    for name in MADE:
        assert planned[name]["bytes"] == sum(tensor.nbytes for tensor in tensors_of(output / name).values())
        assert planned[name]["parameters"] > parameters
    found = json.loads(
        invoke("inspect", output / "05-refit", "--family", output.parent / "my_family.yaml", "--json").output
    )
    assert found["parameters_by_part"]["vision"] == parameters
    assert found["parameters"] == planned["05-refit"]["parameters"] == load(output / "05-refit").num_parameters()
    assert found["transformers"]["loads"]


def test_the_plan_counts_the_tower_without_weights(source: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((source / "config.json").read_text())
    described = plan(recipe_of(tmp_path / "described", tmp_path / "model", DEPTH))
    assert described["checkpoints"] == plan(recipe_of(tmp_path / "whole", source, DEPTH))["checkpoints"]


def test_an_auto_class_that_transformers_has_not_is_told(source: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((source / "config.json").read_text())
    recipe = recipe_of(tmp_path, tmp_path / "model", DEPTH)
    write_family(tmp_path, GLM4V.replace("AutoModelForImageTextToText", "AutoModelForNothing"))
    assert_says(refusal("plan", recipe), "transformers cannot build the model", "AutoModelForNothing")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"stage": "width", "hidden_size": 32}, "the kept towers (vision) give full width"),
        (
            {"stage": "heads", "num_attention_heads": 2},
            "assumes a head_dim of hidden_size 64 / 2 heads, but head_dim is 16",
        ),
    ],
)
def test_stages_that_the_model_cannot_go_through_are_refused(stage: dict, words: str, source: Path, tmp_path: Path):
    assert_says(refusal("plan", recipe_of(tmp_path, source, stage)), words)


def test_a_tower_that_is_not_there_is_named(source: Path, tmp_path: Path):
    file = write_family(tmp_path, GLM4V.replace("kept: {vision: model.visual.}", "kept: {audio: model.audio_tower.}"))
    message = refusal("inspect", source, "--family", file)
    assert_says(message, "model.audio_tower.*: missing", "'audio'")


def test_bits_that_differ_between_layers_load_where_modules_have_other_names(
    tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor, tmp_path: Path
):
    source = save_qwen2vl(tmp_path / "source", tokenizer)
    assert any(name.startswith("visual.") for name in tensors_of(source))
    write_family(tmp_path, QWEN2VL)
    auto = {"stage": "quantize", "bits": "auto", "budget": {"average_bits": 6}, "group_size": 32, "max_divergence": 9}
    own = {"source": str(source), "family": "my_family.yaml"}
    run(write_recipe(tmp_path, source, [IDENTITY, auto], model=own))
    kept, mixed = tmp_path / "out/01-depth", tmp_path / "out/02-quantize"
    torch.testing.assert_close(logits(load(kept), tokens), logits(load(source), tokens), rtol=0, atol=0)
    bits = {entry["bits"] for entry in json.loads((mixed / "stage.json").read_text())["decisions"]["bits"]}
    assert bits == {4, 8}
    assert logits(load(mixed), tokens).isfinite().all()
    found = json.loads(invoke("inspect", mixed, "--family", tmp_path / "my_family.yaml", "--json").output)
    assert found["transformers"] == {"loads": True, "reason": None, "missing": [], "different_shape": []}
