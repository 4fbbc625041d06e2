"""The memory that `plan` says a run needs, and what the system counts for its process."""

import json
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
def test_a_run_takes_about_what_is_planned(tmp_path: Path):
    calibration = {"source": "python-docs", "samples": 16, "sequence_length": 256}
    recipe = write_recipe(tmp_path, ROOT / "reference_model" / "checkpoint", STAGES, calibration=calibration)
    planned = max(entry["peak_memory_bytes_estimate"] for entry in plan(recipe)["checkpoints"])
    command = [sys.executable, "-m", "autoglm_compress", "run", recipe, "--output", tmp_path / "out"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    # What the run has seen of itself: the system's figure would include what the parent had when it made the process.
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["stages"]
    # What the interpreter and its libraries take is half of it here, and varies by some per cent.
    assert planned / 1.25 <= max(row["peak_rss_bytes"] for row in rows) <= 1.05 * planned
