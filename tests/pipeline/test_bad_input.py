"""Damaged checkpoints, occupied folders, missing files: one clear message, exit code 2, nothing half-written."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.command_line import assert_says, refusal
from support.running import digests, invoke, run, write_recipe

torch.set_num_threads(1)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DEPTH = {"stage": "depth", "num_hidden_layers": 2}
FFN = {"stage": "ffn", "intermediate_size": 64, "method": "random"}
NAN = "model.layers.3.mlp.down_proj.weight"
Damage = Callable[[Path], None]
MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of this test's own."""
    return shutil.copytree(make_checkpoint("glm"), tmp_path / "model")


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return recipe_on(tmp_path, model, [DEPTH])


def recipe_on(folder: Path, model: Path, stages: Sequence[dict], **changes: object) -> Path:
    """A recipe that calibrates on a text file."""
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 500)
    calibration = {"source": "text.txt", "samples": 2, "sequence_length": 32}
    return write_recipe(folder, model, stages, **({"calibration": calibration} | changes))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def change_bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda model: (model / WEIGHTS).write_bytes(change((model / WEIGHTS).read_bytes())) and None


def split(model: Path) -> dict[str, str]:
    """Make two shards with an index of a checkpoint; returns which shard holds each tensor."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: SHARDS[number > 20] for number, name in enumerate(names)}
    for shard in SHARDS:
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, model / shard, metadata={"format": "pt"})
    write_index(model, weight_map)
    return weight_map


def write_index(model: Path, weight_map: object) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_index(change: Callable[[dict[str, str]], object]) -> Damage:
    return lambda model: write_index(model, change(split(model)))


def lose_shard(model: Path) -> None:
    split(model)
    (model / SHARDS[1]).unlink()


def lead_outside(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model.parent / "outside.safetensors")
    write_index(model, dict.fromkeys(split(model), "../outside.safetensors"))


def pickle_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"run": "me"}))


def lose_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def write(name: str, text: str) -> Damage:
    return lambda model: (model / name).write_text(text) and None


def lose(name: str) -> Damage:
    return lambda model: (model / name).unlink()


DAMAGES = {
    "no folder": (shutil.rmtree, ["model.source", "no folder"]),
    "no config": (lose("config.json"), ["no config.json"]),
    "config is not JSON": (write("config.json", '{"a": '), ["config.json", "not valid JSON"]),
    "config is a list": (write("config.json", "[]"), ["config.json", "expected a JSON object"]),
    "no weights": (lose(WEIGHTS), ["no weights", INDEX, WEIGHTS]),
    "pickle weights": (pickle_weights, ["pickle", "can run code", "save_pretrained"]),
    "no tokenizer": (lose_tokenizer, ["no tokenizer", "tokenizer.json", "tokenizer.model"]),
    "damaged tokenizer": (write("tokenizer.json", "{"), ["cannot read the tokenizer", "again"]),
    "missing shard": (lose_shard, ["missing shard", SHARDS[1], "26 tensors"]),
    "index leads outside": (lead_outside, [INDEX, "'../outside.safetensors'", "beside the index"]),
    "index leads outside by a detour": (
        change_index(lambda weight_map: dict.fromkeys(weight_map, "a/../../b.safetensors")),
        [INDEX, "'a/../../b.safetensors'", "beside the index"],
    ),
    "index names an absolute path": (
        change_index(lambda weight_map: dict.fromkeys(weight_map, "/etc/model.safetensors")),
        [INDEX, "/etc/model.safetensors"],
    ),
    "index names pickles": (
        change_index(lambda weight_map: dict.fromkeys(weight_map, "pytorch_model.bin")),
        [INDEX, "pytorch_model.bin", "only .safetensors"],
    ),
    "index names the wrong shard": (
        change_index(lambda weight_map: dict.fromkeys(weight_map, SHARDS[0])),
        [INDEX, SHARDS[0], "does not hold the tensor"],
    ),
    "index without a map": (change_index(lambda _: None), [INDEX, "weight_map"]),
    "index with numbers": (change_index(lambda weight_map: dict.fromkeys(weight_map, 1)), [INDEX, "weight_map"]),
    "truncated data": (change_bytes(lambda data: data[:-1000]), [WEIGHTS, "truncated", "expected"]),
    "truncated header": (change_bytes(lambda data: data[:100]), [WEIGHTS, "truncated", "100 bytes"]),
    "more data": (change_bytes(lambda data: data + b"0"), [WEIGHTS, "damaged"]),
    "empty file": (change_bytes(lambda _: b""), [WEIGHTS, "damaged", "0 bytes"]),
    "garbage": (change_bytes(lambda data: bytes(range(256)) * 20), [WEIGHTS, "damaged", "header"]),
    "git-lfs pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "damaged"]),
    "header without tensors": (
        change_bytes(lambda _: (7).to_bytes(8, "little") + b'{"a":1}'),
        [WEIGHTS, "header does not describe tensors"],
    ),
    "wrong shape": (
        change_tensors(lambda tensors: tensors.update({NAN: torch.zeros(64, 96, dtype=torch.bfloat16)})),
        [NAN, "shape [64, 96]", "expected [64, 128]"],
    ),
    "integers": (
        change_tensors(lambda tensors: tensors.update({NAN: torch.zeros(64, 128, dtype=torch.int32)})),
        [NAN, "int32", "floating-point"],
    ),
    "missing tensor": (
        change_tensors(lambda tensors: tensors.pop("model.layers.3.self_attn.q_proj.bias")),
        ["model.layers.3.self_attn.q_proj.bias: missing", "GlmForCausalLM"],
    ),
    "another size in the config": (
        lambda model: (model / "config.json").write_text(
            (model / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
        ),
        ["model.norm.weight: shape [64], expected [32] from config.json", "more"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    name: str, model: Path, recipe: Path, tmp_path: Path
):
    damage, words = DAMAGES[name]
    damage(model)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), model, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [DEPTH, FFN], ids=["while measuring", "while writing"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_numbers_are_refused_when_they_are_read(value: float, stage: dict, model: Path, tmp_path: Path):
    change_tensors(lambda tensors: tensors[NAN][7].fill_(value))(model)
    output = tmp_path / "out"
    message = refusal("run", recipe_on(tmp_path, model, [stage]), "--output", output)
    assert_says(message, model / WEIGHTS, NAN, "128 NaN or infinite values of 8192", "damaged")
    assert {path.name for path in output.iterdir()} == {"manifest.json", ".work", ".lock"}
    assert not list(output.rglob("*.partial"))


def test_a_repaired_checkpoint_goes_on_as_if_it_had_never_been_damaged(model: Path, tmp_path: Path):
    sound = (model / WEIGHTS).read_bytes()
    recipe = recipe_on(tmp_path, model, [DEPTH, FFN])
    change_tensors(lambda tensors: tensors[NAN][7].fill_(float("nan")))(model)
    refusal("run", recipe, "--output", tmp_path / "out")
    (model / WEIGHTS).write_bytes(sound)
    run(recipe)
    repaired = digests(tmp_path / "out")
    run(recipe, "--fresh")
    assert len(repaired) > 10
    assert digests(tmp_path / "out") == repaired


@pytest.fixture(scope="module")
def fuzzed(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(make_checkpoint("glm"), tmp_path_factory.mktemp("fuzzed") / "model")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["config.json", INDEX, WEIGHTS]), st.integers(0, 6000), st.integers(0, 9), st.binary(max_size=4))
def test_no_damage_to_a_file_ends_in_a_traceback(fuzzed: Path, name: str, at: int, removed: int, added: bytes):
    sound = {file: (fuzzed / file).read_bytes() for file in (name, WEIGHTS) if (fuzzed / file).exists()}
    try:
        if name == INDEX:
            split(fuzzed)
        data = (fuzzed / name).read_bytes()
        at %= len(data) if name != WEIGHTS else 5000  # its header
        (fuzzed / name).write_bytes(data[:at] + added + data[at + removed :])
        assert invoke("inspect", fuzzed).exit_code in (0, 2)
    finally:
        for file in (INDEX, *SHARDS):
            (fuzzed / file).unlink(missing_ok=True)
        for file, data in sound.items():
            (fuzzed / file).write_bytes(data)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", '{"recipe": {"name": "other"}}', ["belongs to the recipe 'other'", "'test'", "--output"]),
        ("manifest.json", '{"name": "somebody\'s web app"}', ["not the output of a run", "--output"]),
        ("manifest.json", "[]", ["not the output of a run"]),
        ("manifest.json", '{"recipe"', ["not the output of a run"]),
        ("thesis.txt", "years of work", ["not the output of a run"]),
    ],
)
@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["", "fresh"])
def test_a_folder_that_is_not_this_recipes_is_left_alone(
    name: str, content: str, words: list[str], fresh: tuple[str, ...], recipe: Path, tmp_path: Path
):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text(content)
    before = snapshot(output)
    assert_says(refusal("run", recipe, "--output", output, *fresh), output, *words)
    assert snapshot(output) == before


def test_an_output_that_is_a_file_or_below_one(recipe: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("mine")
    for command in ("run", "plan"):
        assert_says(refusal(command, recipe, "--output", file), f"{file}: is a file", "--output")
        assert_says(refusal(command, recipe, "--output", file / "deep" / "er"), f"{file} is a file", "--output")
    assert file.read_text() == "mine"


def test_an_output_that_cannot_be_written(recipe: Path):
    assert_says(refusal("run", recipe, "--output", "/proc/nowhere"), "/proc/nowhere: ", "--output")


def test_a_disk_that_is_too_small_is_said_before_anything_starts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    message = refusal("run", recipe, "--output", tmp_path / "out")
    assert_says(message, tmp_path / "out", "needs 539 MB of disk", "30 MB are free", "--output")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "dept"], ["--from", "no stage 'dept'", "depth, ffn"]),
        (["--until", "01-depth"], ["--until", "no stage '01-depth'", "depth, ffn"]),
        (["--from", "ffn", "--until", "depth"], ["--from ffn comes after --until depth"]),
        (["--from", "ffn"], ["--from ffn", "01-depth is not finished"]),
        (["--from", "ffn", "--fresh"], ["--fresh", "--from"]),
    ],
)
def test_a_range_of_stages_that_cannot_be(arguments: list[str], words: list[str], model: Path, tmp_path: Path):
    recipe = recipe_on(tmp_path, model, [DEPTH, FFN])
    assert_says(refusal("run", recipe, "--output", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(recipe: Path, tmp_path: Path):
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cuda")
    assert_says(message, "--device cuda", "no GPU", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"source": "none.jsonl"}}, ["calibration.source", "no file 'none.jsonl'", "python-docs"]),
        ({"calibration": {"source": "recipe.yaml"}}, ["calibration.source", "recipe.yaml", ".jsonl"]),
        ({"evaluation": {"perplexity": {"source": "none.txt"}}}, ["evaluation.perplexity.source", "'none.txt'"]),
        ({"evaluation": {"mmlu": {"data": "none"}}}, ["evaluation.mmlu.data", "no folder 'none'"]),
    ],
    ids=["calibration file", "kind of file", "perplexity file", "mmlu folder"],
)
def test_data_that_is_not_there_is_said_before_anything_starts(
    changes: dict, words: list[str], model: Path, tmp_path: Path
):
    recipe = recipe_on(tmp_path, model, [DEPTH], **changes)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"text": "one"}\n{"txt": "two"}\n', ["text.jsonl:2", '"text"', '"messages"']),
        (b'{"text": "one"}\n\n{"text": \n', ["text.jsonl:3", "not valid JSON"]),
        (b'{"messages": []}\n', ["text.jsonl:1", '"role"', '"content"']),
        (b'{"messages": [{"role": "user"}]}\n', ["text.jsonl:1", '"content"']),
        (b"[1]\n", ["text.jsonl:1"]),
        (b'{"text": "too little"}\n', ["text.jsonl", "not enough for one row of sequence_length 32"]),
        (b"", ["text.jsonl", "0 tokens"]),
        (b'{"text": "\xe9t\xe9"}\n', ["text.jsonl", "UTF-8"]),
    ],
)
def test_calibration_text_that_cannot_be_read(text: bytes, words: list[str], model: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_bytes(text)
    calibration = {"source": "text.jsonl", "samples": 2, "sequence_length": 32}
    recipe = recipe_on(tmp_path, model, [DEPTH], calibration=calibration)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_shell_sees_one_line_on_stderr_and_exit_code_2(model: Path, recipe: Path, tmp_path: Path):
    (model / "config.json").unlink()
    command = Path(sys.executable).with_name("autoglm-compress")
    done = subprocess.run([command, "run", recipe], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: {model}: no config.json: not a model checkpoint. Give the folder that holds it."
    ]
    assert not (tmp_path / "runs").exists()
