"""`plan`: the numbers it promises, what it warns of, and what it refuses before any weights are read."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from autoglm_compress.architecture import supported_architectures
from autoglm_compress.recipe import load_recipe
from support.command_line import assert_says, plan, refusal, shapes
from support.models import FAMILIES
from support.places import GLM, GLM4V, OMNI, QWEN, ROOT
from support.running import invoke, run, stage_folders, tensors_of, write_recipe

RECIPES = ROOT / "recipes"
SAVED = {"Qwen/Qwen3-8B": QWEN, "THUDM/GLM-4-9B-0414": GLM, "zai-org/AutoGLM-Phone-9B": GLM4V}
SAVED |= {"Qwen/Qwen2.5-Omni-7B": OMNI}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SMALL_GROUPS = {"group_size": 32}
MakeCheckpoint = Callable[..., Path]


def recipe_of(folder: Path, source: Path, *stages: str, **changes: object) -> Path:
    """A recipe of stages as a user writes them: `width, hidden_size: 64`. They stand in line 4 and on."""
    lines = ["name: test", f"model: {{source: {source}}}", "stages:", *(f"  - {{stage: {stage}}}" for stage in stages)]
    file = folder / "recipe.yaml"
    file.write_text("\n".join(lines) + "\n" + (yaml.safe_dump(changes) if changes else ""))
    return file


def with_config(folder: Path, **changes: object) -> Path:
    """A folder with Qwen3-8B's config, changed; a field set to None is left out."""
    config = json.loads((QWEN / "config.json").read_text()) | changes
    (folder / "model").mkdir()
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "model" / "config.json").write_text(text)
    return folder / "model"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_planned(file: Path, tmp_path: Path):
    source = load_recipe(file).model.source
    local = SAVED.get(source, RECIPES / source)
    local = local if local.exists() else GLM  # a checkout without the reference model
    planned = plan(file, "--set", f"model.source={local}", "--output", tmp_path)
    first, last = planned["checkpoints"][0], planned["checkpoints"][-1]
    assert [entry["name"][:3] for entry in planned["checkpoints"][1:]] == [
        f"{number:02d}-" for number in range(1, len(planned["checkpoints"]))
    ]
    assert last["bytes"] < 0.5 * first["bytes"]
    result = invoke("plan", file, "--set", f"model.source={local}", "--output", tmp_path)
    table = result.output.partition("\n\n")[0].splitlines()
    assert len(table) == len(planned["checkpoints"]) + 1
    assert max(map(len, table)) <= 80
    assert all(entry["name"] in line for entry, line in zip(planned["checkpoints"], table[1:], strict=True))


def test_phone9b_on_qwen3_8b_is_the_chain_of_the_design_card():
    planned = plan(RECIPES / "phone9b.yaml", "--set", f"model.source={QWEN}")["checkpoints"]
    found = {entry["stage"]: tuple(entry["shape"][size] for size in SIZES) for entry in planned}
    assert found["source"] == (36, 4096, 12288, 32, 8)
    assert found["depth"] == (24, 4096, 12288, 32, 8)
    assert found["heads"] == (24, 4096, 12288, 24, 8)
    assert found["ffn"] == (24, 4096, 9216, 24, 8)
    assert found["width"] == found["tie"] == found["quantize"] == (24, 3072, 9216, 24, 8)
    assert {entry["shape"]["head_dim"] for entry in planned} == {128}
    by_name = {entry["name"].partition("-")[2]: entry for entry in planned}
    assert not by_name["width"]["shape"]["tie_word_embeddings"]
    tied = by_name["tie"]
    assert tied["shape"]["tie_word_embeddings"]
    for name, bits in (("int8", 8), ("int4", 4)):
        quantization = by_name[name]["shape"]["quantization"]
        assert quantization["bits"] == bits
        assert set(quantization["group_sizes"].values()) == {128}
        assert by_name[name]["parameters"] == tied["parameters"]


def test_the_numbers_of_qwen3_8b(tmp_path: Path):
    source = plan(recipe_of(tmp_path, QWEN, "tie"))["checkpoints"][0]
    assert source["parameters"] == 8_190_735_360
    assert source["bytes"] == 2 * source["parameters"]
    assert source["kv_cache_bytes_per_1000_tokens"] == 2 * 36 * 8 * 128 * 2 * 1000


def test_the_parameters_of_glm_4_9b(tmp_path: Path):
    assert plan(recipe_of(tmp_path, GLM, "tie"))["checkpoints"][0]["parameters"] == 9_400_279_040


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_those_of_the_files(family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = make_checkpoint(family)
    source = plan(recipe_of(tmp_path, checkpoint, "tie"))["checkpoints"][0]
    tensors = tensors_of(checkpoint).values()
    assert source["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert source["bytes"] == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_what_was_planned_is_what_a_run_writes(family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stages = [
        {"stage": "depth", "layers": [0, 2]},
        {"stage": "heads", "num_attention_heads": 2, "kv_heads": 1, "method": "magnitude"},
        {"stage": "ffn", "intermediate_size": "0.75x", "method": "magnitude"},
        {"stage": "tie"},
        {"stage": "quantize", "name": "int8", "bits": 8, "group_size": -1, "method": "round_to_nearest"},
        {"stage": "quantize", "name": "int4", "from": "depth", "bits": 4, "method": "round_to_nearest"} | SMALL_GROUPS,
        {"stage": "quantize", "name": "head", "from": "depth", "bits": 8, "head_bits": 8} | SMALL_GROUPS,
        {"stage": "quantize", "name": "awq", "from": "depth", "bits": 4, "format": "awq"} | SMALL_GROUPS,
    ]
    recipe = write_recipe(tmp_path, make_checkpoint(family), stages)
    planned = plan(recipe)["checkpoints"][1:]
    run(recipe)
    written = stage_folders(tmp_path / "out")
    assert [folder.name for folder in written] == [entry["name"] for entry in planned]
    for folder, entry in zip(written, planned, strict=True):
        tensors = tensors_of(folder)
        config = json.loads((folder / "config.json").read_text())
        assert {size: config[size] for size in SIZES} == {size: entry["shape"][size] for size in SIZES}
        assert entry["bytes"] == sum(tensor.nbytes for tensor in tensors.values()), folder.name
        if entry["shape"]["quantization"] is None:
            assert entry["parameters"] == sum(tensor.numel() for tensor in tensors.values()), folder.name


def test_json_is_all_that_is_printed_and_no_file_is_written(tmp_path: Path):
    recipe = recipe_of(tmp_path, QWEN, "depth, num_hidden_layers: 12", "quantize, bits: 4")
    command = Path(sys.executable).with_name("autoglm-compress")
    done = subprocess.run([command, "plan", recipe, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    planned = json.loads(done.stdout)
    assert planned["disk_bytes_free"] > 0
    assert planned["disk_bytes_needed"] > sum(entry["disk_bytes"] for entry in planned["checkpoints"]) > 0
    assert [warning for warning in planned["warnings"] if not warning.startswith("disk: ")] == []
    for entry in planned["checkpoints"][1:]:
        assert entry["disk_bytes"] == entry["bytes"]
        assert entry["peak_memory_bytes_estimate"] > 500e6
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_group_size_that_divides_only_some_linears_is_refused_with_those_that_divide_all(tmp_path: Path):
    recipe = recipe_of(tmp_path, QWEN, "ffn, intermediate_size: 3136", "quantize, bits: 4, group_size: 128")
    message = refusal("plan", recipe)
    assert_says(message, "line 5: stages.2.group_size: 128", "3136 input features of mlp.down_proj", ": 64, 32, -1 ")
    smaller = recipe_of(tmp_path, QWEN, "ffn, intermediate_size: 3136", "quantize, bits: 4, group_size: 64")
    assert set(shapes(smaller)[-1]["quantization"]["group_sizes"].values()) == {64}


def test_a_head_dim_that_vllm_ignores_is_warned_of(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stages = "heads, num_attention_heads: 2", "width, hidden_size: 32"
    warnings = plan(recipe_of(tmp_path, make_checkpoint("qwen2"), *stages))["warnings"]
    [warning] = [warning for warning in warnings if "vLLM" in warning]
    assert_says(warning, "01-heads", "head_dim 16", "qwen2")  # 64 / 2 is not 16; after the next stage 32 / 2 is
    for family in ("llama", "qwen3"):
        warnings = plan(recipe_of(tmp_path, make_checkpoint(family), *stages))["warnings"]
        assert not any("vLLM" in warning for warning in warnings)


def test_a_disk_that_is_too_small_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tmp_path, QWEN, "depth, num_hidden_layers: 12")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000_000))
    planned = plan(recipe)
    assert planned["disk_bytes_free"] == 5_000_000_000
    [warning] = planned["warnings"]
    assert_says(warning, "disk: ", "needed", "5 GB free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=planned["disk_bytes_needed"]))
    assert plan(recipe)["warnings"] == []


def test_a_limit_of_memory_refuses_the_stages_that_may_need_more(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    recipe = recipe_of(
        tmp_path, make_checkpoint("glm"), "depth, layers: [0, 1]", "refit", "evaluate, tasks: [perplexity]"
    )
    memory = {entry["name"]: entry["peak_memory_bytes_estimate"] for entry in plan(recipe)["checkpoints"][1:]}
    assert memory["01-depth"] < memory["02-refit"]
    between = f"{(memory['01-depth'] + memory['02-refit']) / 2e6:.0f}MB"
    for command in (["plan"], ["run", "--output", tmp_path / "out"]):
        message = refusal(command[0], recipe, *command[1:], "--memory-limit", between)
        assert_says(message, "--memory-limit", "02-refit")
        assert "01-depth" not in message
    assert not (tmp_path / "out").exists()
    assert_says(refusal("plan", recipe, "--memory-limit", "1MB"), "1 MB may not be enough", "01-depth: ", " MB\n")
    plan(recipe, "--memory-limit", f"{max(memory.values()) / 2**30 + 0.01:.2f}GiB")
    assert_says(refusal("plan", recipe, "--memory-limit", "8"), "--memory-limit", "'8'", "8GB")


def test_one_sample_cannot_be_fitted_to_and_decide(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), "depth, layers: [0, 1]", "refit")
    message = refusal("plan", recipe, "--set", "calibration.samples=1")
    assert_says(message, "stages.2.stage: the one sample decides", "raise calibration.samples")
    plan(recipe, "--set", "calibration.samples=2")


def test_every_stage_that_cannot_work_is_said_at_once(tmp_path: Path):
    recipe = recipe_of(
        tmp_path,
        QWEN,
        "width, hidden_size: 8192",
        "width, name: odd, hidden_size: 3001",
        "heads, num_attention_heads: 20",
        "heads, name: groups, num_attention_heads: 16, kv_heads: 16",
        "depth, num_hidden_layers: 37",
        "depth, name: listed, layers: [0, 36]",
        "depth, name: unordered, layers: [2, 1]",
        "ffn, intermediate_size: 1000",
        "quantize, bits: 4",
    )
    message = refusal("plan", recipe)
    expected = [
        ("line 4: stages.1.hidden_size: 8192", "1 to 4096"),
        ("line 5: stages.2.hidden_size: 3001", "multiple of 8", "3000 or 3008"),
        ("line 6: stages.3.num_attention_heads: 20", "8 KV groups", "[8, 16, 24, 32]"),
        ("line 7: stages.4.kv_heads: 16", "1 to 8"),
        ("line 8: stages.5.num_hidden_layers: 37", "1 to 36"),
        ("line 9: stages.6.layers: [0, 36]", "0 to 35"),
        ("line 10: stages.7.layers: [2, 1]", "ascending"),
        ("line 12: stages.9.group_size: 128", "mlp.down_proj", "1000 input features", "linears: -1 "),
    ]
    lines = message.splitlines()
    assert_says(lines[0], "recipe.yaml: 8 problems:")
    for line, words in zip(lines[1:], expected, strict=False):
        assert_says(line, *words)


def test_a_run_refuses_what_a_plan_refuses_and_writes_nothing(tmp_path: Path):
    recipe = recipe_of(tmp_path, QWEN, "width, hidden_size: 8192")
    message = refusal("run", recipe, "--output", tmp_path / "out")
    assert_says(message, "line 4: stages.1.hidden_size: 8192", "1 to 4096")
    assert not (tmp_path / "out").exists()


def test_a_shape_on_the_way_that_transformers_refuses(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stages = "heads, num_attention_heads: 6", "depth, num_hidden_layers: 2", "width, hidden_size: 48"
    message = refusal("plan", recipe_of(tmp_path, make_checkpoint("llama"), *stages))
    assert_says(message, "1 problem", "line 4: stages.1: transformers cannot load", "(64)", "(6)", "order")
    width_first = stages[2], stages[0], stages[1]
    assert shapes(recipe_of(tmp_path, make_checkpoint("llama"), *width_first))[-1]["num_attention_heads"] == 6
    assert shapes(recipe_of(tmp_path, make_checkpoint("qwen3"), *stages))[-1]["hidden_size"] == 48


def test_embeddings_that_are_tied_already(tmp_path: Path):
    recipe = recipe_of(tmp_path, with_config(tmp_path, tie_word_embeddings=True), "tie")
    assert_says(refusal("plan", recipe), "line 4: stages.1.stage", "tied already")


def test_an_unknown_architecture_is_refused_with_the_supported_ones(tmp_path: Path):
    folder = with_config(tmp_path, architectures=["BloomForCausalLM"], model_type="bloom")
    for command in ("plan", "run"):
        message = refusal(command, recipe_of(tmp_path, folder, "tie"))
        assert_says(message, "config.json", "BloomForCausalLM", *supported_architectures())
    assert len(supported_architectures()) == len([*(ROOT / "autoglm_compress/architecture/families").glob("*.yaml")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": None}, ["none given", "qwen3", "Qwen3ForCausalLM"]),
        ({"architectures": "Qwen3ForCausalLM"}, ["architectures", "expected a list"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_size": "big"}, ["hidden_size", "'big'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers: given 0"]),
        ({"num_attention_heads": 30}, ["30 num_attention_heads", "8 num_key_value_heads"]),
        ({"layer_types": ["full_attention"]}, ["layer_types"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["dtype: given float8_e4m3fn", "bfloat16"]),
        ({"torch_dtype": "half-ish"}, ["half-ish"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantized already", "unquantized"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_planned(tmp_path: Path, changes: dict[str, object], words: list[str]):
    folder = with_config(tmp_path, **changes)
    assert_says(refusal("plan", recipe_of(tmp_path, folder, "depth, num_hidden_layers: 2")), str(folder), *words)


def test_a_source_is_looked_up_beside_the_recipe_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    beside, working = tmp_path / "beside", tmp_path / "working"
    for folder, layers in ((beside, 8), (working, 16)):
        folder.mkdir()
        with_config(folder, num_hidden_layers=layers)
    recipe = recipe_of(beside, Path("model"), "tie")
    monkeypatch.chdir(working)
    assert shapes(recipe)[0]["num_hidden_layers"] == 8
    shutil.rmtree(beside / "model")
    assert shapes(recipe)[0]["num_hidden_layers"] == 16
    shutil.rmtree(working / "model")
    assert_says(refusal("plan", recipe), "model.source", "'model'", beside, working, "not a hub id")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_hub_id_without_a_network(tmp_path: Path, command: str):
    message = refusal(command, recipe_of(tmp_path, Path("nobody/nothing"), "tie"), "--output", tmp_path / "out")
    assert_says(message, "no folder 'nobody/nothing'", "hub did not give", "--set model.source=PATH", "network")
    assert not (tmp_path / "out").exists()
