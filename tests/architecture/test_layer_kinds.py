"""A model whose layers are of two kinds with tensors of their own, described by its user."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.architecture import ModelShape, read_family
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.quantization.smoothing import smoothing_pairs
from support.command_line import assert_says, plan, refusal
from support.own_families import LFM2, save_lfm2, write_family
from support.running import load, logits, run, same_tensors, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)
KEEP_ALL = {"stage": "depth", "layers": [0, 1, 2, 3]}
DEPTH = {"stage": "depth", "name": "listed", "layers": [0, 1, 3]}
TIE = {"stage": "tie", "method": "average"}
HEAL = {"stage": "heal", "tokens": 128, "batch_size": 2, "sequence_length": 32, "checks": 1}
EVALUATE = {"stage": "evaluate", "tasks": ["perplexity"]}
INT8 = {"stage": "quantize", "bits": 8, "group_size": 32, "method": "round_to_nearest"}


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lfm2(tmp_path_factory.mktemp("lfm2"), tokenizer)


def recipe_of(folder: Path, source: Path, *stages: dict, family: str = LFM2) -> Path:
    write_family(folder, family)
    return write_recipe(folder, source, stages, model={"source": str(source), "family": "my_family.yaml"})


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_of(tmp_path_factory.mktemp("chain"), source, KEEP_ALL, DEPTH, TIE, HEAL, EVALUATE, INT8)
    run(recipe)
    return recipe.parent / "out"


@pytest.fixture
def shape(source: Path, tmp_path: Path) -> ModelShape:
    return Checkpoint(source, read_family(write_family(tmp_path, LFM2))).shape


def test_each_layer_has_the_tensors_of_its_kind(shape: ModelShape, source: Path):
    assert shape.layer_kinds == ("conv", "full_attention", "conv", "full_attention")
    assert dict(shape.tensors()) == {name: tuple(tensor.shape) for name, tensor in tensors_of(source).items()}
    assert shape.kinds_of_layers == (0, 1)
    assert list(shape.layer_linears(0))[:2] == ["conv.in_proj", "conv.out_proj"]
    assert shape.with_layers((1, 3)).layer_kinds == ("full_attention", "full_attention")


def test_a_layer_has_the_smoothing_pairs_whose_linears_it_has(shape: ModelShape):
    convolution, attention = ({pair.producer: pair.readers for pair in smoothing_pairs(shape, n)} for n in (0, 1))
    assert convolution["operator_norm"] == ("conv.in_proj",)
    assert attention["operator_norm"] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert convolution.keys() == attention.keys() - {"self_attn.v_proj"}


def test_every_checkpoint_works_in_plain_transformers(output: Path, source: Path, tokens: torch.Tensor):
    folders = stage_folders(output)
    assert [folder.name for folder in folders] == ["01-depth", "02-listed", "03-tie", "04-heal", "06-quantize"]
    for folder in folders:
        assert logits(load(folder, "auto"), tokens).isfinite().all(), folder.name
    assert same_tensors(folders[0], source)
    kinds = json.loads((folders[1] / "config.json").read_text())["layer_types"]
    assert kinds == ["conv", "full_attention", "full_attention"]


def test_dropping_a_layer_is_passing_the_stream_on(output: Path, source: Path, tokens: torch.Tensor):
    reference = load(source)
    reference.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(logits(load(output / "02-listed"), tokens), logits(reference, tokens))


def test_all_matrices_of_both_kinds_are_quantized(output: Path):
    packed = {name for name in tensors_of(output / "06-quantize") if name.endswith("weight_packed")}
    assert {f"model.layers.0.conv.{name}_proj.weight_packed" for name in ("in", "out")} < packed
    assert "model.layers.1.self_attn.out_proj.weight_packed" in packed


def test_the_plan_gives_the_sizes_of_what_is_left(output: Path, source: Path, tmp_path: Path):
    last = plan(recipe_of(tmp_path, source, DEPTH, TIE, INT8))["checkpoints"][-1]
    assert last["bytes"] == sum(tensor.nbytes for tensor in tensors_of(output / "06-quantize").values())


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"stage": "depth", "num_hidden_layers": 3}, ["num_hidden_layers", "conv, full_attention", "layers: [0, 2"]),
        ({"stage": "depth", "num_hidden_layers": 3, "method": "random"}, ["layers: [0, 2"]),
        ({"stage": "heads", "num_attention_heads": 2}, ["differ in their tensors (conv, full_attention)", "heads"]),
        ({"stage": "refit"}, ["refit works on layers that are alike"]),
        ({"stage": "tie"}, ["tie with least_squares"]),
        (INT8 | {"method": "awq"}, ["method: awq", "conv.out_proj", "round_to_nearest"]),
    ],
)
def test_stages_that_need_layers_that_are_alike_are_refused(
    stage: dict, words: list[str], source: Path, tmp_path: Path
):
    assert_says(refusal("plan", recipe_of(tmp_path, source, stage)), *words)


def test_a_list_of_other_kinds_is_named(source: Path, tmp_path: Path):
    family = LFM2.replace("kinds: [conv]", "kinds: [convolution]")
    message = refusal("plan", recipe_of(tmp_path, source, DEPTH, family=family))
    assert_says(message, "config.json: layer_types: given ['conv',", "4 kinds", "convolution, full_attention")
