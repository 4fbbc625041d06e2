"""The memory that `plan` says a run needs, and what the system counts for its process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.command_line import plan
from support.places import ROOT
from support.running import write_recipe

STAGES = [
    {"stage": "depth", "layers": [0, 1, 2, 3]},
    {"stage": "refit", "layer_passes": 1, "logit_passes": 1},
    {"stage": "quantize", "bits": 4, "group_size": 32, "max_divergence": 1e9},
]


@pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None, reason="what is counted is a CPU build's, on Linux"
)
def test_a_run_takes_no_more_than_planned_and_not_much_less(tmp_path: Path):
    calibration = {"source": "python-docs", "samples": 16, "sequence_length": 256}
    recipe = write_recipe(tmp_path, ROOT / "reference_model" / "checkpoint", STAGES, calibration=calibration)
    planned = max(entry["peak_memory_bytes_estimate"] for entry in plan(recipe)["checkpoints"])
    command = [sys.executable, "-m", "autoglm_compress", "run", recipe, "--output", tmp_path / "out"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert planned / 1.25 <= 1024 * usage.ru_maxrss <= planned
