"""Pruning methods against each other: the same model, kept shapes and calibration tokens, in one run and one table.

    python benchmarks/pruning.py [--model FOLDER] [--output DIR] [--samples N]

First each surgery alone, then the chain of all four (untied), at the ratios of recipes/phone9b.yaml. «Minitron» is
block influence and activation importance, one shot (Muralidharan et al. 2024), with the norm gains rescaled as all
methods here get it, which the published method lacks; «PCA» one rotation as in SliceGPT (Ashkboos et al. 2024) without
a refit; «ReplaceMe» (Shopkhoev et al. 2025) a contiguous block replaced by a linear map in the layer before it. «ridge»
is the refit in closed form alone, «ridge and head» with the fit of the head to next tokens, «ours» with that of every
layer as a whole too. Perplexity is that of held-out python-docs.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from chains import (
    CALIBRATION,
    REFERENCE,
    Branch,
    cuts,
    evaluation_options,
    print_table,
    run_branches,
    sizes_for,
    write_results,
)
from replaceme import replace_block

Sizes = dict[str, dict[str, Any]]

RIDGE = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}
LOGITS = {"stage": "refit", "layer_passes": 0}
REFIT = {"stage": "refit"}
MINITRON = {"depth": "block_influence", "heads": "activation", "ffn": "activation", "width": "activation"}
MAGNITUDE = MINITRON | {"heads": "magnitude", "ffn": "magnitude", "width": "magnitude"}
OURS = dict.fromkeys(MINITRON, "")
ALONE: dict[str, list[str]] = {
    "depth": ["random", "block_influence", "angular", "chain"],
    "heads": ["random", "magnitude", "activation", "contribution"],
    "ffn": ["random", "magnitude", "activation", "contribution"],
    "width": ["random", "magnitude", "activation", "least_squares", "pca", "readers"],
}
"""Methods of each stage, worst first; the last is given a ridge refit too."""


def alone(sizes: Sizes) -> dict[str, Branch]:
    """Each surgery by itself, by every method, and its best method with a ridge refit."""
    branches: dict[str, Branch] = {}
    for stage, methods in ALONE.items():
        branches |= {f"{stage} {method}": cuts({stage: method}, sizes) for method in methods}
        best = f"{stage} {methods[-1]}"
        branches |= {f"{best} + ridge": [{"from": best}, RIDGE]}
    return branches


def chains(sizes: Sizes) -> dict[str, Branch]:
    """All four surgeries, as each school does them."""
    return {
        "random": cuts(dict.fromkeys(OURS, "random"), sizes),
        "magnitude": cuts(MAGNITUDE, sizes),
        "Minitron": cuts(MINITRON, sizes),
        "PCA": cuts(OURS | {"depth": "block_influence", "width": "pca"}, sizes),
        "Minitron + ridge": [{"from": "Minitron"}, RIDGE],
        "PCA + ridge": [{"from": "PCA"}, RIDGE],
        "ours, cut only": cuts(OURS, sizes),
        "ours, ridge": [{"from": "ours, cut only"}, RIDGE],
        "ours, ridge and head": [{"from": "ours, cut only"}, LOGITS],
        "ours": [{"from": "ours, cut only"}, REFIT],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-pruning"))
    parser.add_argument("--samples", type=int, default=192, help="calibration rows of 256 tokens")
    arguments = parser.parse_args()
    calibration = {"source": CALIBRATION, "samples": arguments.samples, "sequence_length": 256}
    sizes = sizes_for(arguments.model)
    surgeries, whole_chains = alone(sizes), chains(sizes)
    rows = run_branches(arguments.output, arguments.model, surgeries | whole_chains, calibration, evaluation_options())
    with tempfile.TemporaryDirectory() as folder:
        layers = rows["depth chain"]["shape"]["num_hidden_layers"]
        replaced = replace_block(arguments.model, Path(folder) / "replaceme", layers, calibration)
        found = run_branches(
            arguments.output / "replaceme",
            replaced,
            {"nothing": [{"stage": "depth", "num_hidden_layers": layers, "method": "random"}]},
            calibration,
            evaluation_options(),
        )
    source = {"source": rows["source"]}
    one_by_one = source | {name: rows[name] for name in surgeries}
    one_by_one["depth ReplaceMe"] = found["nothing"]
    whole = source | {name: rows[name] for name in whole_chains}
    print_table("each surgery alone", one_by_one)
    print_table("all four (log increase against Minitron's)", whole, unit=rows["Minitron"])
    results = {"model": arguments.model.name, "calibration_samples": arguments.samples}
    write_results(arguments.output / "pruning.json", results | {"alone": one_by_one, "chains": whole})


if __name__ == "__main__":
    main()
