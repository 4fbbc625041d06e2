"""Pruning methods against each other: the same model, kept shapes and calibration tokens, in one run and one table.

    python benchmarks/pruning.py [--model FOLDER] [--output DIR] [--samples N]

Every row is a chain of depth, heads, FFN and width (untied), as the named method does it untrained. «Minitron» is
block influence and activation importance, one shot (Muralidharan et al. 2024); «PCA» is one rotation as in SliceGPT
(Ashkboos et al. 2024) without a refit. Columns: held-out perplexity, its ratio to the source's, the share of this
package's increase in log-perplexity, quiz accuracy, seconds of all stages.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from autoglm_compress.pipeline import RunOptions, run_recipe
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
MINITRON = {"depth": "block_influence", "heads": "activation", "ffn": "activation", "width": "activation"}
OURS = {"depth": "block_influence", "heads": "contribution", "ffn": "contribution", "width": "pca"}
CHAINS: dict[str, tuple[dict[str, str], bool]] = {
    "random": (dict.fromkeys(OURS, "random"), False),
    "magnitude": (MINITRON | {"heads": "magnitude", "ffn": "magnitude", "width": "magnitude"}, False),
    "Minitron": (MINITRON, False),
    "Minitron + refit": (MINITRON, True),
    "PCA": (OURS, False),
    "ours": (OURS, True),
}


def recipe_for(name: str, model: Path, samples: int) -> dict[str, Any]:
    """The recipe of one chain, measured at its end."""
    methods, refit = CHAINS[name]
    sizes: dict[str, dict[str, Any]] = {
        "depth": {"num_hidden_layers": 24},
        "heads": {"num_attention_heads": "0.75x"},
        "ffn": {"intermediate_size": "0.75x"},
        "width": {"hidden_size": "0.75x"},
    }
    stages = [{"stage": stage, "method": methods[stage]} | size for stage, size in sizes.items()]
    stages += [{"stage": "refit"}] if refit else []
    return {
        "name": "pruning",
        "model": {"source": str(model)},
        "calibration": {"source": "python-docs", "samples": samples, "sequence_length": 512},
        "evaluation": {"mmlu": {"data": str(ROOT / "calib_data" / "quiz"), "limit": 30}},
        "stages": [*stages, {"stage": "evaluate", "tasks": ["perplexity", "mmlu"]}],
    }


def run_chain(name: str, model: Path, output: Path, samples: int) -> list[dict[str, Any]]:
    """The metrics of one chain, from the source to its last stage."""
    folder = output / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(name, model, samples)))
    result = run_recipe(load_recipe(folder / "recipe.yaml"), RunOptions(folder / "run"), Progress(Console(quiet=True)))
    return json.loads((result / "metrics.json").read_text())["stages"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "reference_model" / "checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-pruning"))
    parser.add_argument("--samples", type=int, default=64, help="calibration rows of 512 tokens")
    arguments = parser.parse_args()
    rows = {name: run_chain(name, arguments.model.resolve(), arguments.output, arguments.samples) for name in CHAINS}
    source = rows["ours"][0]
    increase = {name: math.log(chain[-1]["perplexity"] / source["perplexity"]) for name, chain in rows.items()}
    table = Table("chain", "perplexity", "x source", "log increase / ours", "quiz", "seconds", box=None)
    results = []
    for name, chain in rows.items():
        last, seconds = chain[-1], sum(row["seconds"] for row in chain[1:-1])
        result = {
            "chain": name,
            "parameters": last["parameters"],
            "perplexity": last["perplexity"],
            "perplexity_ratio": last["perplexity"] / source["perplexity"],
            "log_increase_over_ours": increase[name] / increase["ours"],
            "accuracy": last["accuracy"],
            "seconds": seconds,
        }
        results.append(result)
        table.add_row(
            name,
            f"{result['perplexity']:.2f}",
            f"{result['perplexity_ratio']:.3f}",
            f"{result['log_increase_over_ours']:.2f}",
            f"{100 * result['accuracy']:.1f}%",
            f"{seconds:.0f}",
        )
    console = Console()
    console.print(
        f"source: perplexity {source['perplexity']:.2f}, quiz {100 * source['accuracy']:.1f}%", highlight=False
    )
    console.print(table)
    (arguments.output / "pruning.json").write_text(json.dumps({"source": source, "chains": results}, indent=2))


if __name__ == "__main__":
    main()
