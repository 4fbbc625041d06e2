"""kill -9: a killed run goes on, to the same bytes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.forward.one_layer_model import OneLayerModel
from support.resuming import NAMES, Write, said
from support.running import Kill, digests, half_written, just_written, run, run_until_killed

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
EVALUATION = "autoglm_compress.evaluation.layerwise_lm:LayerwiseLM.score"
KILLS = [
    half_written("out/manifest.json"),
    Kill(EVALUATION),  # of the source
    half_written("evaluation-", 3),
    half_written("layer-00001.safetensors"),  # measuring
    just_written("layer-00001.safetensors"),
    half_written("walk/progress.json", 3),
    half_written("final.safetensors"),
    just_written("final.safetensors"),
    half_written("01-depth/result/unit-00001"),
    half_written("01-depth/result/model-00001"),
    just_written("01-depth/result/model.safetensors.index"),
    just_written("01-depth/result/stage.json"),
    Kill("pathlib:Path.rename", "01-depth/result", before=False),
    half_written("02-heads/result/unit-00002"),
    half_written("02-heads/result/config.json"),
    just_written("03-ffn/result/unit-00004"),
    half_written("03-ffn/result/lineage.json"),
    half_written("04-width/result/unit-00000"),
    half_written("05-tie/result/unit-00003"),
    half_written("06-refit/result/unit-00002"),
    just_written("06-refit/result/unit-00003"),
    half_written("06-refit/scratch/original/progress.json", 3),
    just_written("06-refit/result/stage.json"),
    half_written("evaluations/06-refit.json"),
    half_written("08-int8/result/unit-00002"),
    just_written("08-int8/result/unit-00002"),
    half_written("08-int8/scratch/progress.json", 4),
    just_written("08-int8/result/model.safetensors.index"),
    half_written("09-int4/result/unit-00001"),
    just_written("09-int4/result/stage.json"),
    half_written("out/metrics.json", 9),
]


def assert_as_if_undisturbed(output: Path, undisturbed: dict[str, str]) -> None:
    assert digests(output) == undisturbed
    strays = [
        path for path in output.rglob("*") if re.search(r"unit-|\.partial|\.old|\.bin|progress\.json|walk-", path.name)
    ]
    assert strays == []
    assert all(path.name.startswith("statistics-") for path in (output / ".work").iterdir())


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill.argument or kill.function} {kill.before}")
def test_a_killed_run_goes_on_to_the_same_bytes(write: Write, tmp_path: Path, undisturbed: dict[str, str], kill: Kill):
    recipe = write(tmp_path)
    assert run_until_killed(recipe, kill)
    run(recipe)
    assert_as_if_undisturbed(tmp_path / "out", undisturbed)


def test_what_was_finished_after_a_kill_is_finished(write: Write, tmp_path: Path, undisturbed: dict[str, str]):
    recipe = write(tmp_path)
    assert run_until_killed(recipe, half_written("01-depth/result/stage.json"))
    run(recipe)
    assert_as_if_undisturbed(tmp_path / "out", undisturbed)
    assert said(run(recipe), "finished before, reused") == NAMES


@pytest.mark.parametrize(("first", "step"), [(1, 4), (2, 5)])
def test_a_run_that_is_killed_again_and_again_arrives(
    write: Write, tmp_path: Path, undisturbed: dict[str, str], first: int, step: int
):
    """Each run gets a few files further; each is killed when a file is written under its temporary name."""
    recipe = write(tmp_path)
    kills = 0
    while run_until_killed(recipe, Kill("os:fsync", call=first + kills * step)):
        kills += 1
    assert kills > 5
    assert_as_if_undisturbed(tmp_path / "out", undisturbed)


def test_a_killed_redo_leaves_the_old_stage_in_place(finished: Path, undisturbed: dict[str, str]):
    assert run_until_killed(finished, half_written("04-width/result/unit-00002"), "--from", "width")
    assert digests(finished.parent / "out") == undisturbed
    run(finished)
    assert_as_if_undisturbed(finished.parent / "out", undisturbed)


def test_a_stage_whose_work_was_not_tidied_can_be_redone(finished: Path, undisturbed: dict[str, str]):
    published = Kill("pathlib:Path.rename", "08-int8/result", before=False)
    assert run_until_killed(finished, published, "--from", "int8")
    assert said(run(finished, "--from", "int8"), "running") == ["08-int8", "09-int4"]
    assert_as_if_undisturbed(finished.parent / "out", undisturbed)


def test_work_for_options_that_changed_meanwhile_is_not_gone_on_with(
    write: Write, tmp_path: Path, undisturbed: dict[str, str]
):
    recipe = write(tmp_path, {"ffn": {"method": "magnitude"}})
    assert run_until_killed(recipe, half_written("03-ffn/result/unit-00003"))
    assert "03-ffn: running" in run(write(tmp_path))
    assert_as_if_undisturbed(tmp_path / "out", undisturbed)


@pytest.mark.parametrize(
    ("kill", "name", "walked", "expected"),
    [
        (half_written("layer-00002.safetensors"), "01-depth", None, [2, 3]),
        (half_written("06-refit/result/unit-00002"), "06-refit", "05-tie", [1, 2]),
        (just_written("08-int8/result/unit-00002"), "08-int8", "06-refit", [1, 2]),
    ],
)
def test_a_killed_walk_goes_on_at_the_layer_it_had_reached(
    source: Path,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill: Kill,
    name: str,
    walked: str | None,
    expected: list[int],
):
    recipe = write(tmp_path)
    assert run_until_killed(recipe, kill)
    folder = tmp_path / "out" / walked if walked else source
    loaded: list[int] = []
    original = OneLayerModel.load

    def load_noted(model: OneLayerModel, layer: int) -> Any:
        if model.checkpoint.folder == folder:
            loaded.append(layer)
        return original(model, layer)

    monkeypatch.setattr(OneLayerModel, "load", load_noted)
    output = run(recipe, "--until", name[3:])
    assert said(output, "going on where an earlier run stopped") == [name]
    assert loaded[: len(expected)] == expected
