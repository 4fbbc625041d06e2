"""A model at its true size through its recipe, killed and resumed on the way.

    OMP_NUM_THREADS=1 python benchmarks/true_size.py [--family glm] [--layers 36] [--rows 8] [--kills 3] [--output DIR]

`glm` is the seed article's model: random weights in the shape of 36 layers, hidden 4096, FFN 16384, 32 heads with keys
and values each, vocabulary 151,552, untied, bf16: 10.9 billion parameters, 21.8 GB, through recipes/phone9b.yaml.
`glm4v` is AutoGLM-Phone-9B with its whole vision tower and 5 of its 40 layers, through recipes/autoglm-phone-4b.yaml:
memory does not grow with layers, time does.

The recipe runs as it is but for what `changes` of the results says. The run is killed with SIGKILL at random moments
and started again, and so is what is killed from outside: give the same command. Writes per stage seconds, CPU seconds,
peak memory, disk traffic and GFLOP/s, all summed over the processes that worked on it, against what a large product
reaches here. For time and memory, not for quality.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from chains import write_results
from flop_counter import FlopCounter
from random_models import matmul_peak, write_checkpoint
from rich.console import Console
from rich.table import Table
from true_size_sources import CHANGES, LENGTH, SOURCES, write_recipe

from autoglm_compress import run
from autoglm_compress.fitting.refit import PairedWalk
from autoglm_compress.forward import statistics
from autoglm_compress.forward.one_layer_model import OneLayerModel
from autoglm_compress.quantization.layer_quantizer import LayerQuantizer
from autoglm_compress.quantization.quantizing_walk import QuantizingWalk
from autoglm_compress.records.files import read_json
from autoglm_compress.resources import Resources

KILL_AFTER = (30.0, 600.0)
"""Seconds after which a process is killed, drawn evenly."""


def run_counted(folder: Path) -> None:
    """Run the recipe in this process; layers are noted in `layers.jsonl`, operations in each `stage.json`."""
    counter, log = FlopCounter(), (folder / "layers.jsonl").open("a")
    counters = Resources._counters

    def noted(owner: type, name: str, what: str) -> Any:
        original: Callable[..., Any] = getattr(owner, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            began, cpu, flops = time.time(), time.process_time(), counter.counts.total()
            result = original(self, *args, **kwargs)
            layer = next((arg for arg in args if isinstance(arg, int)), None)
            event = {"what": what, "layer": layer, "began": began, "seconds": time.time() - began}
            event |= {"cpu_seconds": time.process_time() - cpu, "flops": counter.counts.total() - flops}
            log.write(json.dumps(event | {"flops_so_far": counter.counts.total()}) + "\n")
            log.flush()
            return result

        return patch.object(owner, name, call)

    with (
        patch.object(Resources, "_counters", lambda self: counters(self) | dict(counter.counts)),
        noted(OneLayerModel, "load", "load"),
        noted(statistics._Measure, "enter", "measure enter"),
        noted(statistics._Measure, "leave", "measure leave"),
        noted(PairedWalk, "_refit_layer", "refit"),
        noted(LayerQuantizer, "quantize", "quantize part"),
        noted(QuantizingWalk, "_pass_layer", "quantize whole"),
        counter,
    ):
        run(folder / "recipe.yaml", folder / "run", device="cpu", progress=True)


def run_with_kills(folder: Path, kills: int) -> list[dict[str, Any]]:
    """Run the recipe in processes of its own, so many of which are killed, until one is done; what each took."""
    file = folder / "processes.json"
    processes: list[dict[str, Any]] = read_json(file) or []
    draw = random.Random()
    while not (processes and processes[-1]["exit_code"] == 0):
        killed = sum(process["killed"] for process in processes)
        wait = draw.uniform(*KILL_AFTER) if killed < kills else None
        began = time.time()
        child = subprocess.Popen([sys.executable, __file__, "--output", str(folder), "--child"])
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            child.kill()
        code = child.wait()
        usage = {"began": began, "seconds": time.time() - began, "exit_code": code, "killed": code == -9}
        processes.append(usage)
        write_results(file, processes)
        if code not in (0, -9):
            sys.exit(f"the run failed with exit code {code}")
    return processes


def stage_rows(run: Path, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """What each stage that made a checkpoint took; the share of the peak is time at the peak's speed over time."""
    rows = []
    for file in sorted(run.glob("[0-9][0-9]-*/stage.json")):
        record = json.loads(file.read_text())
        row = {name: record.get(name) for name in ("name", "shape", *Resources.FIELDS)}
        flops = {name.removeprefix("flops_"): count for name, count in record.items() if name.startswith("flops_")}
        at_peak = sum(count / peaks[dtype] / 1e9 for dtype, count in flops.items())
        row |= {"flops": flops, "gflops": sum(flops.values()) / row["seconds"] / 1e9}
        row |= {"share_of_peak": at_peak / row["cpu_seconds"]}
        row["weight_bytes"] = sum(f["bytes"] for n, f in record["files"].items() if n.endswith(".safetensors"))
        rows.append(row)
    return rows


def layer_costs(folder: Path) -> dict[str, dict[str, float]]:
    """The mean over layers, kills left out, of what a layer takes: in `measure` and `quantize` the walk, then the rest.

    Of a process that was killed the layer it was in is not there. `load` is reading and conversion, and in `refit` once
    more. CPU seconds of walks were not taken.
    """
    events = [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]
    costs: dict[str, list[tuple[float, float, float]]] = {}
    entered: dict[str, Any] = {}
    parts: list[tuple[float, float, float]] = []
    for event in events:
        name, _, side = event["what"].partition(" ")
        cost = event["seconds"], event["cpu_seconds"], event["flops"]
        if name == "load":
            parts.clear()  # those of a layer that a killed process was in
        if side == "part":
            parts.append(cost)
            continue
        if side == "whole":
            rest = tuple(sum(column) for column in zip(*parts, strict=True))
            costs.setdefault(f"{name}: walk", []).append(tuple(a - b for a, b in zip(cost, rest, strict=True)))
            costs.setdefault(f"{name}: rest", []).append(rest)
            continue
        if side == "enter":
            entered[name] = event
            continue
        if side == "leave" and name in entered:
            before = entered.pop(name)
            walked = event["began"] - before["began"] - before["seconds"]
            flops = event["flops_so_far"] - event["flops"] - before["flops_so_far"]
            costs.setdefault(f"{name}: walk", []).append((walked, 0.0, flops))
            name = f"{name}: rest"
        costs.setdefault(name, []).append(cost)
    found = {}
    for name, layers in costs.items():
        seconds, cpu, flops = (sum(column) / len(layers) for column in zip(*layers, strict=True))
        found[name] = {"layers": len(layers), "seconds": seconds, "cpu_seconds": cpu, "gflop": flops / 1e9}
    return found


def measure_peaks(file: Path) -> dict[str, float]:
    """GFLOP/s of a large product by dtype, the best that was ever measured here: other work only makes it slower."""
    peaks = read_json(file) or {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        peaks[name] = max(matmul_peak(dtype), peaks.get(name, 0.0))
    write_results(file, peaks)
    return peaks


def print_tables(results: dict[str, Any]) -> None:
    console = Console(width=140)
    table = Table(
        "stage", "seconds", "CPU seconds", "peak GiB", "GB read", "GB written", "GFLOP/s", "of peak", "times", box=None
    )
    for row in results["stages"]:
        table.add_row(
            row["name"],
            f"{row['seconds']:,.0f}",
            f"{row['cpu_seconds']:,.0f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            f"{row['read_bytes'] / 1e9:.1f}",
            f"{row['written_bytes'] / 1e9:.1f}",
            f"{row['gflops']:.0f}",
            f"{100 * row['share_of_peak']:.0f}%",
            str(row["processes"]),
        )
    console.print(table, highlight=False)
    table = Table("per layer", "layers", "seconds", "CPU seconds", "GFLOP", "GFLOP/s", box=None)
    for name, cost in results["layers"].items():
        speed = cost["gflop"] / cost["seconds"]
        table.add_row(
            name,
            str(cost["layers"]),
            f"{cost['seconds']:.2f}",
            f"{cost['cpu_seconds']:.2f}",
            f"{cost['gflop']:,.0f}",
            f"{speed:.0f}" if speed else "",
        )
    console.print(table, highlight=False)
    seconds = sum(process["seconds"] for process in results["processes"])
    killed = sum(process["killed"] for process in results["processes"])
    console.print(f"{seconds / 60:.0f} minutes in {len(results['processes'])} processes, {killed} of them killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SOURCES, default="glm")
    parser.add_argument("--layers", type=int, help="the family's own number by default")
    parser.add_argument("--rows", type=int, default=8, help=f"of {LENGTH} calibration tokens each")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-true-size"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_counted(arguments.output)
        return
    source = SOURCES[arguments.family]
    layers = arguments.layers or source.layers
    prefix = "" if arguments.family == "glm" else f"{arguments.family}-"
    model = arguments.output / f"source-{prefix}{layers}"
    shape = write_checkpoint(model, source.config(layers))
    name = f"{prefix}{layers}-{arguments.rows * LENGTH}"
    folder = arguments.output / name
    write_recipe(folder, source, model, arguments.rows)
    measure_peaks(folder / "peaks.json")
    processes = run_with_kills(folder, arguments.kills)
    peaks = measure_peaks(folder / "peaks.json")
    results = {
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "layers_of_source": layers,
        "tokens": arguments.rows * LENGTH,
        "changes": CHANGES + source.changes,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "matmul_gflops": peaks,
        "stages": stage_rows(folder / "run", peaks),
        "evaluations": {
            file.stem: json.loads(file.read_text())["resources"]
            for file in sorted((folder / "run" / "evaluations").glob("*.json"))
        },
        "layers": layer_costs(folder),
        "processes": processes,
    }
    write_results(arguments.output / f"true_size-{name}.json", results)
    print_tables(results)


if __name__ == "__main__":
    main()
