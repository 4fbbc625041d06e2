"""`evaluate` after a kill: it goes on where it was, and its scores are those of an undisturbed one, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.forward.one_layer_model import OneLayerModel
from support.questions import write_quiz
from support.running import Kill, half_written, invoke, invoke_until_killed, just_written

torch.set_num_threads(1)
LAYERS = 4
"""Of the model: perplexity, MMLU and the two sides of --against send tokens through all of them once."""

WRITES = 1 + LAYERS
"""Of the progress of a walk: a first one with the embeddings."""


@pytest.fixture(scope="module")
def command(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("data")
    quiz = write_quiz(folder / "quiz", "anatomy", "rivers")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"This is about the number {number}."}) for number in range(300)))
    source, other = make_checkpoint("glm"), make_checkpoint("glm", initializer_range=0.11)
    asked = ("--mmlu", quiz, "--num-fewshot", 2, "--text", text, "--samples", 2, "--sequence-length", 32)
    return "evaluate", source, "--against", other, *asked, "--device", "cpu", "--output"


def results(file: Path) -> dict[str, Any]:
    return {task: entry["result"] for task, entry in json.loads(file.read_text())["tasks"].items()}


@pytest.fixture(scope="module")
def undisturbed(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("undisturbed") / "out.json"
    assert invoke(*command, file).exit_code == 0
    assert [path.name for path in file.parent.iterdir()] == ["out.json"]
    return results(file)


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (half_written("progress.json", 3), 4 * LAYERS - 1),  # perplexity, after the first layer
        (just_written("walk-", WRITES + 1 + 3), 3 * LAYERS - 2),  # MMLU, after the second
        (half_written("agreement/", WRITES + 3), LAYERS - 1),
        (half_written(".out.json.partial"), 0),
    ],
    ids=["perplexity", "mmlu", "agreement", "written"],
)
def test_the_same_scores(
    command: tuple[object, ...],
    tmp_path: Path,
    undisturbed: dict[str, Any],
    kill: Kill,
    left: int,
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "out.json"
    assert invoke_until_killed(kill, *command, file)
    assert not file.exists()
    loaded, load = [], OneLayerModel.load
    monkeypatch.setattr(OneLayerModel, "load", lambda self, layer: loaded.append(layer) or load(self, layer))
    output = invoke(*command, file).output
    assert "going on where an earlier evaluation stopped" in output
    assert json.dumps(results(file)) == json.dumps(undisturbed)
    assert len(loaded) == left
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_another_checkpoint_does_not_go_on(
    command: tuple[object, ...], make_checkpoint: Callable[..., Path], tmp_path: Path
):
    file = tmp_path / "out.json"
    assert invoke_until_killed(half_written("progress.json", 3), *command, file)
    other = make_checkpoint("glm", initializer_range=0.11)
    output = invoke("evaluate", other, *command[2:], file).output
    assert "going on" not in output
    assert results(file)["agreement"]["divergence"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
