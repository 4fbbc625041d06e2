"""Every family through every stage: what comes out loads in plain transformers and is what was meant to be cut."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from support.models import SHAPE, TEXT
from support.running import compress, invoke, load, logits, run, same_tensors, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
DEPTH = {"stage": "depth", "num_hidden_layers": 3}
HEADS = {"stage": "heads", "num_attention_heads": "0.5x"}
FFN = {"stage": "ffn", "intermediate_size": 96}
WIDTH = {"stage": "width", "hidden_size": 32}
TIE = {"stage": "tie"}
REFIT = {"stage": "refit"}
EVALUATE = {"stage": "evaluate", "tasks": ["perplexity"]}
INT8 = {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32}
INT4 = {"stage": "quantize", "name": "int4", "from": "refit", "bits": 4, "group_size": 32}
NAMES = ["01-depth", "02-heads", "03-ffn", "04-width", "05-tie", "06-refit", "08-int8", "09-int4"]


@pytest.fixture(scope="module")
def chain(family: str, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of the whole chain, with the plan beside it as JSON."""
    stages = [DEPTH, HEADS, FFN, WIDTH, TIE, REFIT, EVALUATE, INT8, INT4]
    recipe = write_recipe(tmp_path_factory.mktemp("chain"), make_checkpoint(family), stages)
    run(recipe)
    planned = invoke("plan", recipe, "--json")
    (recipe.parent / "plan.json").write_text(planned.output)
    return recipe.parent / "out"


def test_every_checkpoint_of_the_chain_works_in_plain_transformers(chain: Path):
    assert [folder.name for folder in stage_folders(chain)] == NAMES
    for folder in stage_folders(chain):
        model, tokenizer = load(folder, "auto"), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(TEXT, return_tensors="pt")
        assert logits(model, inputs["input_ids"]).isfinite().all(), folder.name
        written = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        assert written.shape[1] == inputs["input_ids"].shape[1] + 4, folder.name
        assert isinstance(tokenizer.decode(written[0]), str)


def test_the_cache_gives_what_a_full_pass_gives(chain: Path, tokens: torch.Tensor):
    model = load(chain / "06-refit")
    with torch.no_grad():
        first = model(tokens[:, :20], use_cache=True)
        rest = model(tokens[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, logits(model, tokens)[:, 20:], rtol=1e-4, atol=1e-4)


def test_shapes_are_those_of_the_plan(chain: Path):
    planned = {entry["name"]: entry for entry in json.loads((chain.parent / "plan.json").read_text())["checkpoints"]}
    measured = {entry["name"]: entry for entry in json.loads((chain / "metrics.json").read_text())["stages"]}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "hidden_size": 32}
    expected = SHAPE | {"tie_word_embeddings": False}
    for name, size in zip(NAMES[:4], sizes, strict=True):
        expected[size] = sizes[size]
        _assert_shape(chain / name, expected, planned[name], measured[name])
    for name in NAMES[4:]:
        _assert_shape(chain / name, expected | {"tie_word_embeddings": True}, planned[name], measured[name])


def _assert_shape(folder: Path, expected: dict[str, Any], planned: dict[str, Any], measured: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected, folder.name  # head_dim among them
    assert planned["shape"] == measured["shape"]
    assert {key: planned["shape"][key] for key in expected} == expected
    assert planned["parameters"] == measured["parameters"]
    stored = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert planned["bytes"] == stored
    if "quantization_config" not in config:
        assert planned["parameters"] == load(folder).num_parameters()


def test_a_tied_checkpoint_holds_the_matrix_once(chain: Path):
    assert tensors_of(chain / "04-width").keys() - tensors_of(chain / "05-tie").keys() == {"lm_head.weight"}
    for name in NAMES[4:]:
        assert "lm_head.weight" not in tensors_of(chain / name)
        model = load(chain / name, "auto")
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["average", "input", "output"])
def test_the_shared_matrix_is_what_was_asked_for(method: str, make_checkpoint: Callable[..., Path], tmp_path: Path):
    source = make_checkpoint("glm")
    before, after = tensors_of(source), tensors_of(compress(tmp_path, source, TIE | {"method": method}))
    embedding, head = before["model.embed_tokens.weight"], before.pop("lm_head.weight")
    expected = {"average": ((embedding.float() + head.float()) / 2).bfloat16(), "input": embedding, "output": head}
    before["model.embed_tokens.weight"] = expected[method]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_int4_comes_from_where_it_says_and_not_from_int8(chain: Path):
    record = json.loads((chain / "09-int4" / "stage.json").read_text())
    assert record["parent"] == "06-refit"
    before, after = tensors_of(chain / "06-refit"), tensors_of(chain / "09-int4")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert "model.layers.0.mlp.down_proj.weight_packed" in after


@pytest.mark.parametrize("tied", [False, True])
def test_keeping_everything_changes_nothing(
    family: str, tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
):
    source = make_checkpoint(family, tie_word_embeddings=tied)
    keep_all = [
        {"stage": "depth", "num_hidden_layers": "1x"},
        {"stage": "heads", "num_attention_heads": 8, "kv_heads": 2},
        {"stage": "ffn", "intermediate_size": "1.0x"},
        {"stage": "width", "hidden_size": "1.0x"},
    ]
    compress(tmp_path, source, *keep_all)
    expected = logits(load(source, "auto"), tokens)
    for folder in stage_folders(tmp_path / "out"):
        assert same_tensors(folder, source), folder.name
        assert torch.equal(logits(load(folder, "auto"), tokens), expected), folder.name


def test_dropping_layers_is_passing_the_stream_on(
    family: str, make_checkpoint: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
):
    source = make_checkpoint(family)
    result = compress(tmp_path, source, {"stage": "depth", "layers": [0, 2, 3]})
    reference = load(source)
    reference.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(logits(load(result), tokens), logits(reference, tokens))


@pytest.mark.parametrize("config_lists_them", [True, False])
def test_sliding_windows_stay_with_their_layers(
    config_lists_them: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
):
    source = make_checkpoint("qwen2")  # layers 2 and 3 have windows
    if not config_lists_them:  # but max_window_layers alone says so
        source = changed_config(source, tmp_path / "source", lambda config: config.pop("layer_types"))
    stages = [{"stage": "depth", "layers": [0, 2, 3]}, FFN, {"stage": "depth", "name": "again", "layers": [0, 2]}]
    compress(tmp_path, source, *stages)
    full, sliding = "full_attention", "sliding_attention"
    kinds = [load(folder).config.layer_types for folder in stage_folders(tmp_path / "out")]
    assert kinds == [[full, sliding, sliding], [full, sliding, sliding], [full, sliding]]


def changed_config(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with another config.json."""
    copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_as_older_checkpoints_have_it_will_do(
    make_checkpoint: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
):
    """Without head_dim, which hidden_size / num_attention_heads gave before heads were cut, and with torch_dtype."""

    def age(config: dict[str, Any]) -> None:
        assert config.pop("head_dim", 8) == 8
        config["torch_dtype"] = config.pop("dtype")

    source = changed_config(make_checkpoint("qwen2", head_dim=8), tmp_path / "source", age)
    result = compress(tmp_path, source, {"stage": "heads", "num_attention_heads": 4})
    model = load(result, "auto")
    assert json.loads((result / "config.json").read_text())["head_dim"] == 8
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    assert model.dtype == torch.bfloat16
    assert logits(model, tokens).isfinite().all()


def test_what_llama_cannot_load_is_refused_by_the_plan(make_checkpoint: Callable[..., Path], tmp_path: Path):
    """Its config wants the number of heads to divide hidden_size, whatever head_dim is."""
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [{"stage": "heads", "num_attention_heads": 6}])
    result = invoke("plan", recipe)
    assert result.exit_code == 2
    assert "not a multiple of the number of attention heads (6)" in " ".join(result.output.split())
