"""Shapes that the stage `shape` finds against shapes that are cut evenly, at no more parameters, on text of several
domains.

    python benchmarks/shape_search.py --model FOLDER --calibration FILE --text novel=FILE speeches=FILE [--output DIR]

For each share of the parameters there are three sides: «even» cuts layers, FFN, heads and width by the same ratio;
«depth and FFN» cuts these two by the same ratio, as recipes/phone-lite.yaml does; «shape» may have as many parameters
as the smaller of the two. Each side is measured as it is cut, and with --refit also after a refit in closed form alone.
The loss is the mean negative log-likelihood of plain transformers, in nats per token; the table has its increase over
the source's.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from chains import CALIBRATION, REFERENCE, write_results
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoglm_compress import run
from autoglm_compress.architecture import ModelShape
from autoglm_compress.architecture.loading_rules import likely_refusal
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.shaping.grid import grid_of
from autoglm_compress.shaping.search import even_place
from autoglm_compress.stages.shape import Shape
from autoglm_compress.stages.shape_trials import explicit
from autoglm_compress.stages.surgeries import surgeries

RIDGE = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}
Stages = list[dict[str, Any]]


def stages_to(source: ModelShape, shape: ModelShape) -> Stages:
    """The surgeries by default methods from one shape to another."""
    steps = surgeries(source, shape, "chain", lambda found: likely_refusal(source, found))
    assert steps is not None
    return [explicit(stage) for stage in steps]


def sides_of(source: ModelShape, share: float) -> dict[str, Stages]:
    """The stages of every side at a share of the parameters."""
    stage = Shape.model_validate({"stage": "shape", "target": {"parameters": f"{share:g}x"}})
    even = stage.plan(source)
    whole = (source.num_attention_heads, source.num_key_value_heads, source.hidden_size)
    grid = grid_of(
        source,
        None,
        stage.target.size,
        lambda shape: (shape.num_attention_heads, shape.num_key_value_heads, shape.hidden_size) == whole,
    )
    place = even_place(grid, stage.target.limit(source))
    assert place is not None
    two = grid.shape(place)
    parameters = min(even.parameters, two.parameters)
    return {
        "even": stages_to(source, even),
        "depth and FFN": stages_to(source, two),
        "shape": [{"stage": "shape", "target": {"parameters": parameters}}],
    }


def losses(folder: Path, texts: dict[str, Path], rows: int, length: int) -> dict[str, float]:
    """The loss of a checkpoint on windows from the middle of each text, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for name, file in texts.items():
        text = file.read_text(encoding="utf-8")
        ids = tokenizer(text[len(text) // 2 :][: 12 * rows * length], add_special_tokens=False)["input_ids"]
        rows = min(rows, len(ids) // length)
        windows = torch.tensor(ids[: rows * length]).view(rows, length)
        with torch.no_grad():
            found[name] = fmean(float(model(row[None], labels=row[None]).loss) for row in windows)
    return found


def run_sides(
    output: Path, model: Path, calibration: dict[str, Any], shares: list[float], refit: bool
) -> dict[tuple[float, str], Path]:
    """Run all sides at all shares in one recipe; the checkpoint of each."""
    source = Checkpoint(model).shape
    stages: Stages = []
    ends: dict[tuple[float, str], str] = {}
    for share in shares:
        for side, chain in sides_of(source, share).items():
            parent = "source"
            for stage in [*chain, *([RIDGE] if refit else [])]:
                label = f"{share:g}-{side.replace(' ', '-')}-{stage['stage']}"
                stages.append(stage | {"name": label, "from": parent})
                ends[share, f"{side} + ridge" if stage is RIDGE else side] = label
                parent = label
    recipe = {"name": output.name, "model": {"source": str(model)}, "calibration": calibration, "stages": stages}
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run(output / "recipe.yaml", output / "run", progress=True)
    numbers = {stage["name"]: number for number, stage in enumerate(stages, 1)}
    return {end: output / "run" / f"{numbers[label]:02d}-{label}" for end, label in ends.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--calibration", type=Path, help="a text file; by default what the demo takes")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE", help="the first is the calibration's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65])
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--rows", type=int, default=32, help="windows of each text")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-shape-search"))
    arguments = parser.parse_args()
    began = time.process_time()
    texts = {name: Path(file) for name, _, file in (entry.partition("=") for entry in arguments.text)}
    calibration = {
        "source": CALIBRATION if arguments.calibration is None else str(arguments.calibration.resolve()),
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
    }
    folders = run_sides(arguments.output, arguments.model.resolve(), calibration, arguments.shares, arguments.refit)
    source = losses(arguments.model, texts, arguments.rows, arguments.sequence_length)
    rows = []
    for (share, side), folder in folders.items():
        found = losses(folder, texts, arguments.rows, arguments.sequence_length)
        record = json.loads((folder / "stage.json").read_text())
        rise = {name: found[name] - source[name] for name in texts}
        others = [rise[name] for name in list(texts)[1:]]
        rows.append(
            {
                "share": share,
                "side": side,
                "parameters": Checkpoint(folder).shape.parameters,
                "shape": record["shape"],
                "increase": rise,
                "off_domain": fmean(others),
                "seconds": record["seconds"],
                "stages": [stage["options"] for stage in record["decisions"].get("stages", [])],
            }
        )
    print_sides(rows, list(texts))
    calibration["source"] = "the demo's" if arguments.calibration is None else arguments.calibration.name
    results = {"model": arguments.model.name, "calibration": calibration, "source": source, "sides": rows}
    write_results(arguments.output / "shape_search.json", results | {"cpu_seconds": time.process_time() - began})


def print_sides(rows: list[dict[str, Any]], texts: list[str]) -> None:
    """The increase of the loss by domain, and off the calibration's domain relative to the better even side."""
    table = Table(
        "share", "side", "params", "layers", "FFN", "heads", "wide", *texts, "off domain", "of even", box=None
    )
    for row in rows:
        repaired = row["side"].endswith("ridge")
        like = [
            other["off_domain"]
            for other in rows
            if other["share"] == row["share"]
            and other["side"].endswith("ridge") == repaired
            and not other["side"].startswith("shape")
        ]
        shape = row["shape"]
        table.add_row(
            f"{row['share']:g}",
            row["side"],
            f"{row['parameters'] / 1e6:.2f}M",
            str(shape["num_hidden_layers"]),
            str(shape["intermediate_size"]),
            f"{shape['num_attention_heads']}/{shape['num_key_value_heads']}",
            str(shape["hidden_size"]),
            *(f"{row['increase'][name]:.3f}" for name in texts),
            f"{row['off_domain']:.3f}",
            f"{100 * row['off_domain'] / min(like):.0f} %" if math.isfinite(min(like)) else "",
        )
    Console(width=150).print(table, highlight=False)


if __name__ == "__main__":
    main()
