"""Runs of several processes that know of each other, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from support.places import TESTS
from support.running import Kill

ARMED = """
import os
import sys

sys.path.insert(0, {tests!r})
from support.running import Kill
from autoglm_compress.cli import app

if os.environ["RANK"] == "{rank}":
    {kill!r}.arm()
app()
"""


def launch(recipe: Path, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a recipe in several processes."""
    return _launch(["-m", "autoglm_compress"], processes, recipe, *arguments)


def launch_until_killed(recipe: Path, rank: int, kill: Kill, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a recipe in two processes, of which one is killed on the way; the launcher then ends the other."""
    script = recipe.with_suffix(".py")
    script.write_text(ARMED.format(tests=str(TESTS), rank=rank, kill=kill))
    return _launch([str(script)], 2, recipe, *arguments)


def _launch(program: list[str], processes: int, recipe: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += program
    command += map(str, ["run", recipe, "--device", "cpu", *arguments])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
