"""What the peers need for the article's full-size model, as far as they run, and how they end.

    OMP_NUM_THREADS=1 python benchmarks/true_size_peers.py [--minutes 10] [--output DIR]

The source is that of `true_size.py`: 36 layers, 4096 wide, FFN 16384, 151,552 words, untied, 21.8 GB. Each peer first
has one layer of it, with the same embedding and head, then the model: llm-compressor with what does not fit in memory
offloaded to disk, AutoAWQ through the package's backend, without which it does not know GLM, and mergekit, which
removes 12 of the layers. A peer is stopped after so many minutes, or when little memory is left: the system would kill
it, or something else, soon after.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import yaml
from chains import write_results
from quantization_peers import INSTALL, SETTINGS, WORKER, WORKERS, environment, versions
from random_models import article_config, write_checkpoint
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

ROWS, LENGTH = 4, 128
LEAST_MEMORY = 1 << 30
"""Of the machine, below which a peer is stopped."""
MERGEKIT = "mergekit"
OURS = "ours"
INSTALL[MERGEKIT] = [["mergekit==0.1.5", "transformers==5.24.0", "torch==2.13.0"]]
SIDES = (MERGEKIT, OURS, *WORKER)
KEPT_LAYERS = ((0, 20), (32, 36))


@dataclass(frozen=True)
class Outcome:
    """How a process ended (`done`, `failed`, `out of time`, `out of memory`), and what it took until then."""

    end: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    last_line: str


def watched(command: list[str | Path], report: Path, minutes: float) -> Outcome:
    """Run a command until it ends or must be stopped; its output goes to a log beside the report."""
    log = report.with_suffix(".log")
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    measured = [sys.executable, WORKERS / "measured.py", report, *command]
    began, end = time.monotonic(), ""
    with log.open("w") as output:
        process = psutil.Popen(measured, stdout=output, stderr=subprocess.STDOUT, env=variables)
        while process.poll() is None:
            if time.monotonic() - began > 60 * minutes:
                end = "out of time"
            elif psutil.virtual_memory().available < LEAST_MEMORY:
                end = "out of memory"
            if end:
                for child in process.children(recursive=True):
                    child.kill()
                process.wait()
            time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    end = end or ("done" if process.returncode == 0 else "failed")
    return Outcome(end, **json.loads(report.read_text()), last_line=lines[-1] if lines else "")


def quantize(side: str, environments: Path, model: Path, rows: Path, folder: Path) -> list[str | Path]:
    """The command that quantizes a model to INT4 by a peer, or by us."""
    if side == OURS:
        recipe = {
            "name": "true-size-peers",
            "model": {"source": str(model)},
            "calibration": {"source": "python-docs", "samples": ROWS, "sequence_length": LENGTH},
            "stages": [SETTINGS["int4-g128"].stage() | {"max_divergence": 100.0}],
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        run = [folder / "recipe.yaml", "--output", folder / "run", "--fresh"]
        return [sys.executable, "-m", "autoglm_compress", "run", *run]
    options = asdict(SETTINGS["int4-g128"]) | {"dtype": "bfloat16", "offload": str(folder / "offload")}
    python = environment(environments, side)
    return [python, WORKERS / WORKER[side], "quantize", model, rows, json.dumps(options), folder]


def remove_layers(environments: Path, model: Path, folder: Path) -> list[str | Path]:
    """The command that removes layers with mergekit."""
    slices = [{"sources": [{"model": str(model), "layer_range": list(layers)}]} for layers in KEPT_LAYERS]
    config = {"merge_method": "passthrough", "dtype": "bfloat16", "slices": slices}
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    program = environment(environments, MERGEKIT).with_name("mergekit-yaml")
    return [program, folder / "mergekit.yaml", folder / "merged"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="that each may take")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="the others' results stay")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-true-size-peers"))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    environments = output / "environments"
    models = {}
    for layers in (1, arguments.layers):
        models[layers] = output / f"source-{layers}"
        write_checkpoint(models[layers], article_config(layers, key_value_heads=32))
    rows = output / "rows.safetensors"
    torch.manual_seed(0)
    save_file({"rows": torch.randint(1, 1000, (ROWS, LENGTH))}, rows)
    results = output / "true_size_peers.json"
    found = json.loads(results.read_text())["runs"] if results.exists() else []
    found = [run for run in found if run["side"] not in arguments.sides]
    # Ours with all layers is in the results of true_size.py.
    tasks = [(MERGEKIT, arguments.layers), (OURS, 1), *((side, layers) for layers in models for side in WORKER)]
    for side, layers in tasks:
        if side not in arguments.sides:
            continue
        folder = output / f"{side}-{layers}"
        folder.mkdir(parents=True, exist_ok=True)
        command = (
            remove_layers(environments, models[layers], folder)
            if side == MERGEKIT
            else quantize(side, environments, models[layers], rows, folder)
        )
        outcome = watched(command, folder / "report.json", arguments.minutes)
        found.append({"side": side, "layers": layers} | asdict(outcome))
        write_results(
            results,
            {
                "tokens": ROWS * LENGTH,
                "threads": torch.get_num_threads(),
                "memory_bytes": psutil.virtual_memory().total,
                "minutes": arguments.minutes,
                "versions": versions(),
                "runs": found,
            },
        )
    table = Table("", "layers", "end", "seconds", "CPU seconds", "peak GiB", box=None)
    for row in found:
        numbers = (f"{row['seconds']:,.0f}", f"{row['cpu_seconds']:,.0f}", f"{row['peak_rss_bytes'] / 2**30:.1f}")
        table.add_row(row["side"], str(row["layers"]), row["end"], *numbers)
    Console(width=100).print(table, highlight=False)


if __name__ == "__main__":
    main()
