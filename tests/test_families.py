"""Every family through every stage: what comes out loads in plain transformers and is what was meant to be cut."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SHAPE, build_model
from running import compress, invoke, load, logits, run, same_tensors, stage_folders, tensors_of, write_recipe
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.reconstruction.lineage import Lineage

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
TEXT = "Return the number of items in a container. Raises TypeError where an object has no len(), or 数.\n"
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
def tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Two rows of real text, longer than the sliding windows of the models that have one."""
    return torch.tensor(tokenizer(TEXT * 2)["input_ids"][:64]).view(2, 32)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


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


# Parts that do nothing can go and nothing changes.


def save_changed(
    family: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    change: Callable[[str, torch.Tensor], None],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A tiny model with `change` applied to every tensor, which it is given by name and in place."""
    model = build_model(family, rms_norm_eps=1e-12).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["activation", "magnitude", "contribution"])
def test_dead_neurons_go_first_and_are_not_missed(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tokens: torch.Tensor
):
    alive = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:48]
    dead = torch.ones(128, dtype=torch.bool).index_fill(0, alive, False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if ".mlp.down_proj.weight" in name:
            tensor[:, dead] = 0
        elif ".mlp.up_proj" in name:
            tensor[dead] = 0
        elif ".mlp.gate_up_proj" in name:
            tensor[128:][dead] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill)
    result = compress(tmp_path, source, {"stage": "ffn", "intermediate_size": 48, "method": method})
    assert set(Lineage.load(result / "lineage.json").neurons) == {tuple(sorted(alive.tolist()))}
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "sizes", "alive"),
    [
        ("magnitude", {"num_attention_heads": 4}, [1, 2, 4, 7]),
        ("magnitude", {"num_attention_heads": 2, "kv_heads": 1}, [5, 6]),
        ("contribution", {"num_attention_heads": 4}, [0, 3, 4, 6]),
        ("contribution", {"num_attention_heads": 2, "kv_heads": 1}, [1, 2]),
        ("activation", {"num_attention_heads": 4, "kv_heads": 1}, [4, 5, 6, 7]),
    ],
)
def test_dead_heads_go_first_and_are_not_missed(
    family: str,
    method: str,
    sizes: dict[str, int],
    alive: list[int],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    tokens: torch.Tensor,
):
    dead = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor(alive), False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if "o_proj.weight" in name:
            tensor.view(64, 8, 16)[:, dead] = 0
        elif "v_proj" in name and method == "activation":  # what the dead heads' outputs are made of
            tensor[:16] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill)
    result = compress(tmp_path, source, {"stage": "heads", "method": method} | sizes)
    lineage = Lineage.load(result / "lineage.json")
    assert set(lineage.heads) == {tuple(alive)}
    assert set(lineage.key_value_heads) == {tuple(sorted({head // 4 for head in alive}))}
    assert load(result).config.num_key_value_heads == sizes.get("kv_heads", 2)
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "sizes"), [("activation", [16]), ("magnitude", [16]), ("activation", [40, 16])])
def test_dead_channels_go_first_and_are_not_missed(
    family: str,
    method: str,
    sizes: list[int],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    tokens: torch.Tensor,
):
    """A quarter of the channels is alive, so the norms' gains must double, at once or in two steps."""
    alive = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:16]
    dead = torch.ones(64, dtype=torch.bool).index_fill(0, alive, False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if "embed_tokens" in name:
            tensor[:, dead] = 0
        elif "o_proj" in name or "down_proj" in name:  # weights and biases
            tensor[dead] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill, torch.float32)
    stages = [{"stage": "width", "name": f"to{size}", "hidden_size": size, "method": method} for size in sizes]
    result = compress(tmp_path, source, *stages)
    assert Lineage.load(result / "lineage.json").channels == tuple(sorted(alive.tolist()))
    before, after = tensors_of(source), tensors_of(result)
    norms = [name for name in after if name.endswith("norm.weight") and ".self_attn." not in name]
    assert len(norms) == 1 + 4 * (4 if family == "glm4" else 2)
    for name in norms:
        torch.testing.assert_close(after[name], 2 * before[name][~dead], rtol=1e-4, atol=0, msg=name)
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


# What was cut twice refers to the source's statistics.


@pytest.fixture(scope="module")
def uneven(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first and third layers do little, so that `depth` keeps the others and every index shifts."""

    def weaken(name: str, tensor: torch.Tensor) -> None:
        if any(writer in name for writer in ("o_proj", "down_proj", "post_self_attn_layernorm", "post_mlp_layernorm")):
            tensor *= {"0": 0.01, "2": 0.1}.get(name.split(".")[2], 1)

    return save_changed(family, tmp_path_factory.mktemp("uneven"), tokenizer, weaken)


@pytest.mark.parametrize("method", ["activation", "contribution"])
def test_cutting_in_steps_and_in_any_order_is_cutting_at_once(uneven: Path, method: str, tmp_path: Path):
    """All scores of depth, heads and ffn come from the source, so neither steps nor their order matter."""
    at_once = [
        {"stage": "depth", "num_hidden_layers": 2},
        {"stage": "heads", "num_attention_heads": 2, "method": method},
        {"stage": "ffn", "intermediate_size": 64, "method": method},
    ]
    in_steps = [
        {"stage": "ffn", "name": "ffn1", "intermediate_size": 96, "method": method},
        {"stage": "depth", "name": "depth1", "num_hidden_layers": 3},
        {"stage": "heads", "name": "heads1", "num_attention_heads": 4, "method": method},
        *reversed(at_once),
    ]
    one = compress(tmp_path / "one", uneven, *at_once)
    other = compress(tmp_path / "other", uneven, *in_steps)
    assert Lineage.load(one / "lineage.json").layers == (1, 3)
    assert same_tensors(one, other)
    assert (one / "lineage.json").read_bytes() == (other / "lineage.json").read_bytes()


@pytest.mark.parametrize("method", ["activation", "random"])
def test_the_lineage_says_what_every_tensor_was(uneven: Path, method: str, tmp_path: Path):
    """Heads, neurons and channels are each cut twice; what is left is the source at the lineage's indices."""
    stages = [
        {"stage": "width", "name": "w1", "hidden_size": 48, "method": method},
        {"stage": "heads", "name": "h1", "num_attention_heads": 4, "method": method},
        {"stage": "ffn", "name": "f1", "intermediate_size": 96, "method": method},
        {"stage": "depth", "num_hidden_layers": 2},
        {"stage": "width", "name": "w2", "hidden_size": 32, "method": method},
        {"stage": "heads", "name": "h2", "num_attention_heads": 2, "kv_heads": 1, "method": method},
        {"stage": "ffn", "name": "f2", "intermediate_size": 64, "method": method},
    ]
    result = compress(tmp_path, uneven, *stages, seed=3)
    lineage = Lineage.load(result / "lineage.json")
    assert lineage.layers == (1, 3)
    before, after = tensors_of(uneven), tensors_of(result)
    family = Checkpoint(uneven).family
    for name, tensor in after.items():
        original, norm = name, name.endswith("norm.weight") and tensor.shape == (32,)
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if ".layers." in name:
            original = name.replace(f".{layer}.", f".{lineage.layers[layer]}.", 1)
        kept = before[original]
        for dimension, axis in enumerate(family.axes_of(original)):
            kept = kept.index_select(dimension, _indices(axis, lineage, layer))
        # A gain is multiplied by one number at each of the two cuts, and rounded to bfloat16 after each.
        ratio = (tensor.float() / kept.float()).median() if norm else 1.0
        torch.testing.assert_close(tensor.float(), kept.float() * ratio, rtol=0.02 if norm else 0, atol=0, msg=name)


def _indices(axis: str, lineage: Lineage, layer: int) -> torch.Tensor:
    """Indices into the source along one axis."""

    def rows(heads: tuple[int, ...]) -> list[int]:
        return [head * 16 + dim for head in heads for dim in range(16)]

    neurons = lineage.neurons[layer]
    return torch.tensor(
        {
            "vocab": range(512),
            "hidden": lineage.channels,
            "query": rows(lineage.heads[layer]),
            "key_value": rows(lineage.key_value_heads[layer]),
            "head_dim": range(16),
            "intermediate": neurons,
            "gate_up": [*neurons, *(128 + neuron for neuron in neurons)],
        }[axis]
    )


@pytest.mark.parametrize(("axis", "option"), [("heads", "num_attention_heads"), ("ffn", "intermediate_size")])
def test_the_seed_decides_what_random_keeps(
    axis: str, option: str, make_checkpoint: Callable[..., Path], tmp_path: Path
):
    stage = {"stage": axis, option: "0.5x", "method": "random"}
    kept = [compress(tmp_path / str(n), make_checkpoint("glm"), stage, seed=seed) for n, seed in enumerate((1, 1, 2))]
    assert same_tensors(kept[0], kept[1])
    assert not same_tensors(kept[0], kept[2])
