"""What healing brings back: from our reconstruction and from Minitron's one-shot cut, by tokens and by ways to train.

    python benchmarks/healing.py [--tokens 100k 500k 2M] [--output DIR]

The chain of recipes/demo.yaml, tied, is cut and refitted as it is there, and by block influence and activation
importance in one shot, tied by averaging («Minitron»). Both are healed, ours in several ways, and quantized in the end.
What is finished in DIR is used again.
"""

import argparse
from pathlib import Path
from typing import Any

from chains import CALIBRATION, REFERENCE, Branch, cuts, evaluation_options, print_table, run_branches, write_results
from pruning import MINITRON, OURS, REFIT

HEAL = {
    "stage": "heal",
    "batch_size": 4,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "residual": 1.0,
    "random_tokens": 0.25,
}
ADAMW = {"optimizer": "adamw", "learning_rate": 5e-4}
WRITTEN = {"data": "teacher_samples"}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": ADAMW,
    "cross-entropy alone": {"cross_entropy": 1.0, "residual": 0.0},
    "LoRA of rank 16": ADAMW | {"lora": {"rank": 16, "alpha": 32}, "learning_rate": 2e-3},
    "no residual stream": {"residual": 0.0},
    "no random tokens": {"random_tokens": 0.0},
    "the 64 likeliest tokens": {"teacher_top_k": 64, "residual": 0.0},
}
QUANTIZE = {"stage": "quantize", "bits": 4, "group_size": 32}


def branches(few: str, many: str, most: str) -> dict[str, Branch]:
    """Every start, and every way from it, on few tokens, many, or most of all."""
    found: dict[str, Branch] = {
        "ours": [*cuts(OURS), REFIT, {"stage": "tie", "output_weight": 1.5}],
        "Minitron": [*cuts(MINITRON), {"stage": "tie", "method": "average"}],
        f"ours, {few}": [{"from": "ours"}, HEAL | {"tokens": few}],
        f"ours, {many}": [{"from": "ours"}, HEAL | {"tokens": many}],
        f"ours, {many} that the teacher wrote": [{"from": "ours"}, HEAL | {"tokens": many} | WRITTEN],
        f"Minitron, {many}": [{"from": "Minitron"}, HEAL | {"tokens": many}],
    }
    for name, way in WAYS.items():
        found[f"ours, {few}, {name}"] = [{"from": "ours"}, HEAL | {"tokens": few} | way]
    best = f"ours, {most}"
    scales = {"stage": "heal", "tokens": few, "batch_size": 4, "learning_rate": 1e-3}
    return found | {
        best: [{"from": "ours"}, HEAL | {"tokens": most}],
        f"{best}, INT4": [{"from": best}, QUANTIZE],
        f"{best}, INT4, its scales on {few}": [{"from": f"{best}, INT4"}, scales],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs=3, default=["100k", "500k", "2M"], help="few, many and most")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-healing"))
    arguments = parser.parse_args()
    calibration = {"source": CALIBRATION, "samples": 128, "sequence_length": 256}
    found = branches(*arguments.tokens)
    rows = run_branches(arguments.output, REFERENCE, found, calibration, evaluation_options())
    print_table("healing (log increase against Minitron's cut)", rows, unit=rows["Minitron"])
    write_results(arguments.output / "healing.json", rows)


if __name__ == "__main__":
    main()
