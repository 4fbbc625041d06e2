"""`autoglm-compress export`: a checkpoint as files, without a recipe; what cannot be is refused in one message."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoglm_compress import export_checkpoint
from autoglm_compress.hashing import sha256
from support.command_line import assert_says, refusal
from support.exporting import export, metadata, quantize, recipe_of, run_stages, stage_folder, stored
from support.running import digests, half_written, invoke, invoke_until_killed, just_written, run, run_until_killed

torch.set_num_threads(1)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of INT4, and the export of it by the same recipe beside it."""
    folder = tmp_path_factory.mktemp("run")
    run_stages(folder, make_checkpoint("glm"), quantize("int4"), export("int4"))
    return stage_folder(folder / "out", "int4")


@pytest.fixture(scope="module")
def whole_onnx(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of it to ONNX that nothing disturbed."""
    output = tmp_path_factory.mktemp("onnx") / "out"
    assert invoke(*export_of(quantized, output, "--format", "onnx")).exit_code == 0
    return output


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file, by name."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def export_of(checkpoint: Path, output: Path, *options: object) -> tuple[object, ...]:
    return "export", checkpoint, "--format", "gguf", "--output", output, "--device", "cpu", *options


def test_the_file_is_that_of_a_recipe(quantized: Path, tmp_path: Path):
    result = invoke(*export_of(quantized, tmp_path / "out", "--memory-limit", "2GB"))
    assert result.exit_code == 0, result.output
    assert_says(" ".join(result.output.split()), "proven with llama.cpp: KL divergence", "export: ")
    of_recipe = next(stage_folder(quantized.parent, "int4-gguf").glob("*.gguf"))
    assert (tmp_path / "out" / of_recipe.name).read_bytes() == of_recipe.read_bytes()
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record["verified"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_function_gives_what_is_on_record(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = export_checkpoint(quantized, tmp_path / "out", "gguf", called="tiny", device="cpu")
    assert capsys.readouterr() == ("", "")
    assert found.as_data() == json.loads((tmp_path / "out/export.json").read_text())
    assert found.file == "tiny-Q4_0.gguf"
    assert found.bytes == (tmp_path / "out" / found.file).stat().st_size
    assert found.proof is not None
    assert found.proof.kl_divergence < 1e-3


def test_options(quantized: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"number {n} is a number"}) for n in range(300)))
    options = ("--embedding-bits", 8, "--called", "tiny", "--text", tmp_path / "text.jsonl")
    (tmp_path / "out").mkdir()  # an empty folder will do
    result = invoke(*export_of(quantized, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/tiny-Q4_0.gguf").exists()
    assert metadata(tmp_path / "out")["general.name"] == "tiny"
    assert stored(tmp_path / "out")["token_embd.weight"][0] == "Q8_0"


def test_bad_options_are_refused(quantized: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for options, words in {
        ("--embedding-bits", 4): ["--embedding-bits", "given 4"],
        ("--called", "a/b"): ["--called", "given 'a/b'"],
        ("--text", tmp_path / "none.jsonl"): ["--text", "none.jsonl"],
        ("--output", tmp_path / "full"): ["--output", "is there already"],
        ("--output", tmp_path / "no/folder"): ["--output", "no folder"],
    }.items():
        assert_says(refusal(*export_of(quantized, tmp_path / "out", *options)), *words)
    assert_says(refusal(*export_of(tmp_path / "none", tmp_path / "out")), "none: no such folder")
    result = invoke("export", quantized, "--format", "onyx", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_folder_without_tokenizer_is_refused(quantized: Path, tmp_path: Path):
    bare = shutil.copytree(quantized, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert_says(refusal(*export_of(bare, tmp_path / "out")), "bare: no tokenizer")


def test_too_little_disk_is_told_before_anything_is_written(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    assert_says(refusal(*export_of(quantized, tmp_path / "out")), "of disk and 1 kB are free")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_anything_is_written(quantized: Path, tmp_path: Path):
    message = refusal(*export_of(quantized, tmp_path / "out", "--memory-limit", "100MB"))
    assert_says(message, "--memory-limit: 100 MB may not be enough for the export, which takes up to")
    assert_says(refusal(*export_of(quantized, tmp_path / "out", "--memory-limit", "much")), "given 'much'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kill",
    [half_written("result/int4-Q4_0.gguf"), just_written("result/int4-Q4_0.gguf"), just_written("written.json")],
)
def test_a_killed_export_goes_on_to_the_same_bytes(kill, quantized: Path, tmp_path: Path):
    arguments = export_of(quantized, tmp_path / "out")
    assert invoke_until_killed(kill, *arguments)
    assert not (tmp_path / "out").exists()
    assert invoke(*arguments).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    of_recipe = next(stage_folder(quantized.parent, "int4-gguf").glob("*.gguf"))
    assert (tmp_path / "out" / of_recipe.name).read_bytes() == of_recipe.read_bytes()


@pytest.mark.parametrize(
    "kill",
    [half_written("result/model.onnx"), just_written("result/model.onnx"), just_written("written.json")],
)
def test_a_killed_export_to_onnx_goes_on_to_the_same_bytes(kill, quantized: Path, whole_onnx: Path, tmp_path: Path):
    arguments = export_of(quantized, tmp_path / "out", "--format", "onnx")
    assert invoke_until_killed(kill, *arguments)
    assert not (tmp_path / "out").exists()
    assert invoke(*arguments).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(tmp_path / "out") == hashes(whole_onnx)


@pytest.mark.parametrize(
    "kill",
    [half_written("02-int4-gguf/result/int4-Q4_0.gguf"), just_written("scratch/written.json")],
)
def test_a_killed_run_goes_on_to_the_same_bytes(kill, quantized: Path, make_checkpoint: Make, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), quantize("int4"), export("int4"))
    assert run_until_killed(recipe, kill)
    assert "02-int4-gguf: going on where an earlier run stopped" in run(recipe)
    assert digests(tmp_path / "out") == digests(quantized.parent)
