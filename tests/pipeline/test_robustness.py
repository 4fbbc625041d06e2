"""What goes wrong around a run: two at once, signals, full and read-only disks, another source, other versions."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from autoglm_compress import atomic
from autoglm_compress.checkpoint import CheckpointWriter, writer
from support.command_line import assert_says, refusal
from support.running import digests, half_written, invoke, run, run_until_killed, write_recipe

torch.set_num_threads(1)
STAGES = [
    {"stage": "depth", "layers": [0, 2, 3]},
    {"stage": "ffn", "intermediate_size": 96, "method": "magnitude"},
]


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), source, STAGES)
    run(recipe, pictures=True)
    return digests(recipe.parent / "out")


@pytest.fixture
def recipe(source: Path, tmp_path: Path) -> Path:
    """The recipe of a run on a copy of the source, which can be changed."""
    copytree(source, tmp_path / "source")
    return write_recipe(tmp_path, tmp_path / "source", STAGES)


def at_second_unit(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Have something happen when the second unit of the second stage is about to be written."""
    original = CheckpointWriter.write

    def write(self: CheckpointWriter, number: int, *arguments: Any, **options: Any) -> None:
        if "02-ffn" in str(self.folder) and number == 1:
            what()
        original(self, number, *arguments, **options)

    monkeypatch.setattr(CheckpointWriter, "write", write)


def assert_nothing_half_written(output: Path) -> None:
    assert not [path for path in output.rglob(".*") if path.is_file() and path.name != ".lock"]
    assert not (output / "02-ffn").exists()


def test_a_second_run_in_the_folder_is_refused(recipe: Path, tmp_path: Path):
    run(recipe, "--until", "depth")
    before = digests(tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"):
        message = refusal("run", recipe, "--output", tmp_path / "out")
        assert_says(message, tmp_path / "out", "another run is at work there", "--output")
        assert digests(tmp_path / "out") == before
    run(recipe)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_one_line_and_it_goes_on(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, str],
    number: signal.Signals,
    code: int,
):
    # A process in the background of a shell is started deaf to SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patches:
        at_second_unit(patches, lambda: os.kill(os.getpid(), number))
        result = invoke("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == code
    last = result.output.strip().splitlines()[-1]
    assert last == "stopped: what is finished is kept, and the same command goes on at the layer it had reached"
    assert "Traceback" not in result.output
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_nothing_half_written(tmp_path / "out")
    assert "02-ffn: going on where an earlier run stopped" in run(recipe, pictures=True)
    assert digests(tmp_path / "out") == undisturbed


def no_room(*_: Any, **__: Any) -> None:
    """How safetensors says it."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_ends_the_run_in_one_message_and_it_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
):
    with monkeypatch.context() as patches:
        at_second_unit(patches, lambda: patches.setattr(writer, "save_file", no_room))
        message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, tmp_path / "out", "the disk is full", "the same command again")
    assert_nothing_half_written(tmp_path / "out")
    assert "02-ffn: going on where an earlier run stopped" in run(recipe, pictures=True)
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["the disk is full"]),
        (errno.EROFS, ["cannot write there: Read-only file system", "--output"]),
        (errno.EACCES, ["cannot write there: Permission denied", "--output"]),
    ],
)
def test_a_disk_that_takes_no_more_ends_the_run_in_one_message(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: list[str]
):
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    at_second_unit(monkeypatch, lambda: monkeypatch.setattr(atomic, "_sync", fail))
    assert_says(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu"), tmp_path / "out", *words)
    assert_nothing_half_written(tmp_path / "out")


def test_a_source_that_disappears_is_named_and_the_run_goes_on_when_it_is_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
):
    weights = tmp_path / "source" / "model.safetensors"
    with monkeypatch.context() as patches:
        at_second_unit(patches, lambda: weights.rename(tmp_path / "weights"))
        message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, weights, "gone", "Put it back", "same command again")
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), tmp_path / "source", "no weights")
    (tmp_path / "weights").rename(weights)
    assert "02-ffn: going on where an earlier run stopped" in run(recipe, pictures=True)
    assert digests(tmp_path / "out") == undisturbed


def test_a_source_that_changes_is_named_and_nothing_of_it_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = tmp_path / "source" / "model.safetensors"

    def change() -> None:
        content = bytearray(weights.read_bytes())
        content[-2:] = bytes(2)
        weights.write_bytes(content)

    with monkeypatch.context() as patches:
        at_second_unit(patches, change)
        message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, weights, "changed while it was being read", "same command again")
    assert_nothing_half_written(tmp_path / "out")
    output = run(recipe)
    assert "01-depth: its options, or what it depends on, changed: done again" in output
    assert "02-ffn: running" in output


def test_what_other_versions_made_is_said_and_not_gone_on_with(
    recipe: Path, tmp_path: Path, undisturbed: dict[str, str]
):
    assert run_until_killed(recipe, half_written("02-ffn/result/unit-00002"), pictures=True)
    for file in (tmp_path / "out/01-depth/stage.json", tmp_path / "out/.work/02-ffn/key.json"):
        record = json.loads(file.read_text())
        record["versions"]["torch"] = "1.0"
        file.write_text(json.dumps(record))
    output = run(recipe, pictures=True)
    assert f"01-depth: finished before, reused, though made with torch 1.0 (here it is {torch.__version__})" in output
    assert "--from depth repeats it" in output
    assert "02-ffn: running" in output
    assert digests(tmp_path / "out") == undisturbed


def test_what_safetensors_was_writing_when_it_was_killed_is_not_in_the_checkpoint(
    recipe: Path, tmp_path: Path, undisturbed: dict[str, str]
):
    assert run_until_killed(recipe, half_written("02-ffn/result/unit-00002"), pictures=True)
    (tmp_path / "out/.work/02-ffn/result/.tmpQmASvy").write_bytes(b"half of a unit")
    run(recipe, pictures=True)
    assert digests(tmp_path / "out") == undisturbed


def test_checkpoints_can_be_read_by_whom_other_files_can(recipe: Path, tmp_path: Path):
    run(recipe)
    (tmp_path / "file").write_text("")
    modes = {file.stat().st_mode for file in (tmp_path / "out/02-ffn").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}
