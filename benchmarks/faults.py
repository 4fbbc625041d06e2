"""A run killed with SIGKILL at random moments, again and again, against one that nothing disturbs: the same bytes?

    python benchmarks/faults.py [--kills 20] [--seed 0] [--output DIR]

A random model of 6 layers, 384 wide, goes through all structural stages, a refit and two quantizations. Each process is
killed at a moment that knows nothing of what it does (the CPU seconds after its first word are exponentially
distributed), and the same command is given again, until one gets to the end; if that took too few kills, it begins once
more. Exit code 1 if a byte of a checkpoint differs, or
something is left over that the undisturbed run does not leave.
"""

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from chains import REFERENCE, ROOT, write_results
from random_models import article_config, write_checkpoint
from rich.console import Console
from transformers import AutoTokenizer

from autoglm_compress.hashing import sha256
from autoglm_compress.pipeline.run_folder import LOCK

STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "num_hidden_layers": 4},
    {"stage": "heads", "num_attention_heads": 4, "kv_heads": 4},
    {"stage": "ffn", "intermediate_size": 1536},
    {"stage": "width", "hidden_size": 256},
    {"stage": "tie"},
    {"stage": "refit"},
    {"stage": "evaluate", "tasks": ["perplexity"]},
    {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 128},
    {"stage": "quantize", "name": "int4", "from": "refit", "bits": 4, "group_size": 128},
]
TEXT = ROOT / "calib_data" / "quiz_prompts.jsonl"
SHARE = 0.06
"""How long a process lives on average, of the CPU seconds that an undisturbed run takes."""
POLL_SECONDS = 0.02


TIMED = ("stage.json", "manifest.json", "metrics.json", "report.html")
"""Files, beside those in evaluations/, that say when things were done or how long they took."""


class Process:
    """The run in a process of its own; what it says goes to a file."""

    def __init__(self, recipe: Path, output: Path) -> None:
        self._said = recipe.with_name("said.txt")
        command = [sys.executable, "-u", "-m", "autoglm_compress", "run", str(recipe), "--output", str(output)]
        with self._said.open("w") as stream:
            environment = os.environ | {"COLUMNS": "200"}
            self._child = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        self._before = 0.0
        while self.runs and not self.said:
            time.sleep(POLL_SECONDS)
        self._before = self.cpu_seconds

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def runs(self) -> bool:
        return self._child.poll() is None

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds since its first word."""
        times = self._child.cpu_times()
        return times.user + times.system - self._before

    def wait(self, cpu_seconds: float) -> float:
        """Until it has ended or used so much; the CPU seconds it used."""
        used = 0.0
        while self.runs and used < cpu_seconds:
            time.sleep(POLL_SECONDS)
            with suppress(psutil.Error):  # it may have ended just now
                used = self.cpu_seconds
        if not self.runs and self._child.returncode:
            sys.exit(self.said)
        return used

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


def left(output: Path) -> dict[str, str]:
    """Every file of a run, with the hash of those that do not hold times."""
    found = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(file.relative_to(output))
        timed = file.name in TIMED or name.startswith("evaluations/")
        found[name] = "" if timed else sha256(file)
    return found


def half_written(output: Path) -> list[str]:
    """The files under temporary names."""
    return [str(path.relative_to(output)) for path in output.rglob(".*") if path.is_file() and path.name != LOCK]


def undisturbed(recipe: Path, output: Path) -> float:
    """Run once without kills; CPU seconds from its first word."""
    shutil.rmtree(output, ignore_errors=True)
    return Process(recipe, output).wait(math.inf)


def disturbed(recipe: Path, output: Path, mean: float, draw: random.Random) -> list[dict[str, Any]]:
    """Run with kills until one process is done; when each was killed, and what it had said last."""
    shutil.rmtree(output, ignore_errors=True)
    kills = []
    while True:
        process = Process(recipe, output)
        used = process.wait(draw.expovariate(1 / mean))
        if not process.runs:
            return kills
        process.kill()
        last = process.said.strip().splitlines()[-1]
        found = {"cpu_seconds": round(used, 2), "said_last": last, "half_written": half_written(output)}
        kills.append(found)
        print(len(kills), found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-faults"))
    arguments = parser.parse_args()
    model = arguments.output / "source"
    vocabulary = -(-len(AutoTokenizer.from_pretrained(REFERENCE)) // 64) * 64
    sizes = {"hidden_size": 384, "intermediate_size": 2048, "heads": 6, "key_value_heads": 6}
    shape = write_checkpoint(model, article_config(6, vocab_size=vocabulary, **sizes))
    recipe = {
        "name": "faults",
        "model": {"source": str(model.resolve())},
        "calibration": {"source": str(TEXT), "samples": 16, "sequence_length": 128},
        "evaluation": {"perplexity": {"samples": 4, "sequence_length": 128}, "every_stage": ["perplexity"]},
        "stages": STAGES,
    }
    file = arguments.output / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    seconds = undisturbed(file, arguments.output / "undisturbed")
    expected = left(arguments.output / "undisturbed")
    draw, rounds = random.Random(arguments.seed), []
    while sum(len(found["kills"]) for found in rounds) < arguments.kills:
        kills = disturbed(file, arguments.output / "disturbed", SHARE * seconds, draw)
        found = left(arguments.output / "disturbed")
        differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        rounds.append({"kills": kills, "differing_files": differ})
    kills = [kill for found in rounds for kill in found["kills"]]
    differ = sorted({name for found in rounds for name in found["differing_files"]})
    results = {
        "parameters": shape.parameters,
        "undisturbed_cpu_seconds": round(seconds, 1),
        "files": len(expected),
        "hashed_files": sum(bool(digest) for digest in expected.values()),
        "kills": len(kills),
        "killed_while_writing": sum(bool(kill["half_written"]) for kill in kills),
        "differing_files": differ,
        "rounds": rounds,
    }
    write_results(arguments.output / "faults.json", results)
    Console(width=120).print(
        f"{results['kills']} kills, {results['killed_while_writing']} of them in the middle of a file, in "
        f"{len(rounds)} runs of {results['hashed_files']} hashed files: {len(differ)} differ",
        highlight=False,
    )
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
