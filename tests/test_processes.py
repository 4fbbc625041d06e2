"""A run of two processes, as launchers start them: the same losses as one, and one writer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import run, write_recipe

from autoglm_compress.errors import UserError
from autoglm_compress.healing.sharding import require_equal_parts
from autoglm_compress.processes import Processes

STAGES = [
    {"stage": "depth", "layers": [0, 1, 3]},
    {"stage": "heal", "tokens": 1024, "batch_size": 4, "checks": 2, "learning_rate": 1e-3, "teacher_top_k": 256},
]


def launch(recipe: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a recipe in two processes that know of each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "autoglm_compress", "run", recipe, "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_train_as_one_does(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), STAGES)
    run(recipe)
    found = launch(recipe, "--output", tmp_path / "two")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("results: ") == 1
    alone, together = (
        json.loads((tmp_path / output / "02-heal" / "stage.json").read_text())["decisions"] for output in ("out", "two")
    )
    for one, other in zip(alone["curve"], together["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    assert alone["kept"]["divergence"] == pytest.approx(together["kept"]["divergence"], rel=1e-2)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size: 3 rows cannot be shared by 2 processes"):
        require_equal_parts(3, Processes(rank=0, count=2))
