"""A run of two processes, as launchers start them: the results of one up to rounding, and one writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.errors import UserError
from autoglm_compress.healing.sharding import require_equal_parts
from autoglm_compress.processes import ALONE, Processes
from support.launching import launch, launch_until_killed
from support.running import digests, half_written, just_written, run, tensors_of, write_recipe

HEALING = [
    {"stage": "depth", "layers": [0, 1, 3]},
    {"stage": "heal", "tokens": 1024, "batch_size": 4, "checks": 2, "learning_rate": 1e-3, "teacher_top_k": 256},
]
CUTS = [
    {"stage": "depth", "num_hidden_layers": 3},
    {"stage": "heads", "num_attention_heads": 6},
    {"stage": "ffn", "intermediate_size": 96},
    {"stage": "width", "hidden_size": 32},
]
RIDGE = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}
SHARED = [
    *CUTS,
    RIDGE,
    {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32},
    {"stage": "refit", "name": "distilled", "from": "width"},
]
ODD = {"source": "python-docs", "samples": 17, "sequence_length": 32}
"""Rows that two processes cannot have equally many of: 8 and 9, or of the 3 that are held out 1 and 2."""


def decisions(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / name / "stage.json").read_text())["decisions"]


def difference(one: Path, other: Path) -> float:
    """The norm of the difference between two checkpoints' tensors, relative to that of the first."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    size = sum(float(tensor.double().square().sum()) for tensor in first.values())
    return (sum(float((first[k].double() - second[k].double()).square().sum()) for k in first) / size) ** 0.5


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_choose_and_fit_as_one_does(tmp_path: Path, make_checkpoint: Callable[..., Path], processes: int):
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), SHARED, calibration=ODD)
    run(recipe)
    found = launch(recipe, "--output", tmp_path / "many", processes=processes)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("results: ") == 1
    one, many = tmp_path / "out", tmp_path / "many"
    for name in ("01-depth", "02-heads", "03-ffn"):
        assert difference(one / name, many / name) == 0  # the same layers, heads and neurons were kept
    # What rounding to bf16 makes of other last bits; the fits by gradient amplify it.
    for name, limit in {"04-width": 1e-3, "05-refit": 2e-2, "07-distilled": 1e-1}.items():
        assert difference(one / name, many / name) < limit
    for alone, together in zip(decisions(one, "06-int8")["layers"], decisions(many, "06-int8")["layers"], strict=True):
        assert alone.keys() == together.keys()


def test_two_processes_train_as_one_does(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), HEALING)
    run(recipe)
    found = launch(recipe, "--output", tmp_path / "two")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("results: ") == 1
    alone, together = (decisions(tmp_path / output, "02-heal") for output in ("out", "two"))
    for one, other in zip(alone["curve"], together["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    assert alone["kept"]["divergence"] == pytest.approx(together["kept"]["divergence"], rel=1e-2)


def test_two_processes_that_are_killed_go_on_to_the_same_bytes(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    """The first in a refit, then the second while layers are measured for quantizing."""
    stages = [{"stage": "depth", "layers": [1, 3]}, RIDGE, {"stage": "quantize", "bits": 4, "group_size": 32}]
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), stages, calibration=ODD)
    kills = [
        half_written("compressed/progress.json", 3),
        half_written("03-quantize/scratch/process-1/progress.json", 2),
    ]
    for rank, kill in enumerate(kills):
        killed = launch_until_killed(recipe, rank, kill, "--output", tmp_path / "killed")
        assert killed.returncode
        assert "results: " not in killed.stdout
    for name in ("killed", "undisturbed"):
        found = launch(recipe, "--output", tmp_path / name)
        assert found.returncode == 0, found.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")


def test_one_process_begins_anew_what_two_have_begun(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    stages = [{"stage": "depth", "layers": [1, 3]}, RIDGE]
    recipes = [
        write_recipe(tmp_path / name, make_checkpoint("glm"), stages, calibration=ODD) for name in ("two", "one")
    ]
    kill = just_written("02-refit/result/unit-00002")
    assert launch_until_killed(recipes[0], 0, kill, "--output", tmp_path / "two" / "out").returncode
    for recipe in recipes:
        run(recipe, pictures=True)
    assert digests(tmp_path / "two" / "out") == digests(tmp_path / "one" / "out")


def test_rows_are_dealt_out_evenly():
    batches = [torch.arange(3), torch.arange(3, 4), torch.arange(4, 7)]
    shares = [torch.cat(Processes(rank, 2).share(batches)).tolist() for rank in range(2)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    assert [len(part) for part in ALONE.share(batches)] == [3, 1, 3]
    with pytest.raises(UserError, match="7 rows cannot be shared by 8 processes"):
        Processes(0, 8).require_rows(7)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size: 3 rows cannot be shared by 2 processes"):
        require_equal_parts(3, Processes(rank=0, count=2))
