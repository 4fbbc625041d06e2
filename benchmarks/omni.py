"""The embedded model that sees and hears, compressed with and without images and sounds: what it still answers.

    pip install espeakng-loader
    python -m reference_model.omni.write_rows runs/omni-rows --rows 1200
    OMP_NUM_THREADS=1 python benchmarks/omni.py --rows runs/omni-rows [--output DIR]

Runs `recipes/omni-demo.yaml` twice: as it is, and calibrated on its rows of text alone. Accuracy is the share of right
greedy answers in plain transformers, to questions about images and voices that training never met, after each stage.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from chains import ROOT, write_results
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(ROOT))  # where the model's own scripts are

from autoglm_compress import run
from reference_model.omni.evaluate import Row, accuracy, read_rows

RECIPE = ROOT / "recipes" / "omni-demo.yaml"
DATA = ROOT / "reference_model" / "omni" / "data"
KINDS = ("image", "audio", "both", "text")


def changes() -> dict[str, dict[str, Any]]:
    """What differs from the recipe: nothing, or rows of text alone, from which no adapter can be shared."""
    recipe = yaml.safe_load(RECIPE.read_text())
    calibration = recipe["calibration"] | {"source": str(DATA / "calibration-text.jsonl")}
    stages = [stage for stage in recipe["stages"] if stage["stage"] != "share_adapter"]
    return {"images, sounds, text": {}, "text alone": {"calibration": calibration, "stages": stages}}


def run_with(change: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the recipe with something changed; the rows of its metrics by stage, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    changed = {"base": str(RECIPE), "name": folder.name} | change
    recipe.write_text(yaml.safe_dump(changed, sort_keys=False))
    return {row.name: row.as_data() for row in run(recipe, folder / "run", progress=True).rows}


def measured(rows: dict[str, Any], folder: Path, questions: list[Row]) -> dict[str, Any]:
    """Accuracy by kind of question, parameters and seconds of the source and of each stage."""
    source = ROOT / "reference_model" / "omni" / "checkpoint"
    return {
        name: {
            "parameters": row["parameters"],
            "bytes": row["bytes"],
            "seconds": row["seconds"],
            "accuracy": accuracy(source if name == "source" else folder / "run" / name, questions),
        }
        for name, row in rows.items()
    }


def show(title: str, stages: dict[str, Any]) -> None:
    """A table by stage."""
    table = Table("", "params", "KB", *KINDS, "seconds", box=None)
    for name, stage in stages.items():
        shares = [f"{100 * stage['accuracy'][kind]:.1f}%" if kind in stage["accuracy"] else "" for kind in KINDS]
        table.add_row(
            name,
            f"{stage['parameters'] / 1e6:.2f}M",
            f"{stage['bytes'] / 1e3:.0f}",
            *shares,
            f"{stage['seconds'] or 0:.0f}",
        )
    console = Console(width=120)
    console.print(f"\nCalibrated on {title}", highlight=False, style="bold")
    console.print(table, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=DATA, help="folder of test.jsonl and test-text.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark-omni")
    options = parser.parse_args()
    torch.set_num_threads(1)
    questions = [row for name in ("test", "test-text") for row in read_rows(options.rows / f"{name}.jsonl")]
    found = {}
    for title, change in changes().items():
        folder = options.output / title.replace(", ", "-").replace(" ", "-")
        found[title] = measured(run_with(change, folder), folder, questions)
        show(title, found[title])
    write_results(options.output / "omni.json", {"questions": len(questions), "by_calibration": found})


if __name__ == "__main__":
    main()
