"""Evaluations that are to be done again, or were lost: each is measured once, and none stays unknown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.running import invoke, run, write_recipe

DEPTH = {"stage": "depth", "layers": [0, 1, 2]}
EVALUATE = {"stage": "evaluate", "tasks": ["perplexity"]}
FFN = {"stage": "ffn", "intermediate_size": 64, "method": "magnitude"}
STAGES = [DEPTH, EVALUATE, FFN]


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm")


def write(folder: Path, source: Path, stages: list[dict[str, Any]] = STAGES, samples: int = 2) -> Path:
    perplexity = {"samples": samples, "sequence_length": 32}
    return write_recipe(folder, source, stages, evaluation={"every_stage": [], "perplexity": perplexity})


def perplexity_of(output: Path, name: str) -> float | None:
    rows = {row["name"]: row for row in json.loads((output / "metrics.json").read_text())["stages"]}
    return rows[name]["perplexity"]


def test_results_that_were_lost_are_measured_again(source: Path, tmp_path: Path):
    """As when a run that was to evaluate again is killed before it has."""
    recipe = write(tmp_path, source)
    run(recipe)
    expected = perplexity_of(tmp_path / "out", "02-evaluate")
    (tmp_path / "out/evaluations/01-depth.json").unlink()
    output = run(recipe)
    assert "02-evaluate: missing or damaged files: done again" in output
    assert "01-depth: evaluating perplexity" in output
    assert perplexity_of(tmp_path / "out", "02-evaluate") == expected


def test_a_fresh_run_evaluates_as_often_as_a_first_one(source: Path, tmp_path: Path):
    stages = [EVALUATE | {"name": "before"}, *STAGES]
    first = run(write(tmp_path, source, stages))
    assert run(write(tmp_path, source, stages), "--fresh").count("evaluating") == first.count("evaluating") == 2


def test_evaluations_of_one_checkpoint_that_are_done_again_are_measured_once(source: Path, tmp_path: Path):
    recipe = write(tmp_path, source, [DEPTH, EVALUATE, EVALUATE | {"name": "once-more"}])
    run(recipe)
    output = run(recipe, "--from", "evaluate")
    assert output.count("01-depth: evaluating perplexity") == 1


def test_from_does_an_evaluation_before_it_that_is_not_done(source: Path, tmp_path: Path):
    run(write(tmp_path, source))
    output = run(write(tmp_path, source, samples=1), "--from", "ffn")
    assert "02-evaluate: its options, or what it depends on, changed: done again" in output
    assert "03-ffn: done again (--from ffn)" in output


def test_stages_that_are_alike_keep_their_folders(source: Path, tmp_path: Path):
    recipe = write(tmp_path, source, [DEPTH, EVALUATE | {"name": "one"}, EVALUATE | {"name": "two"}])
    run(recipe, "--until", "one")
    output = run(recipe)
    assert "02-one: finished before, reused" in output
    assert "done again" not in output


def test_a_folder_that_cannot_be_looked_into_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("autoglm_compress.pipeline.run.find_inputs", refuse)
    result = invoke("run", write(tmp_path, source), "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "cannot write there: Permission denied" in " ".join(result.output.split())
