"""What healing brings back: from our reconstruction and from Minitron's one-shot cut, by tokens and by ways to train.

    python benchmarks/healing.py [--tokens 100k 500k 2M] [--minitron-tokens 100k 500k] [--output DIR]

The chain of recipes/demo.yaml, tied, is cut and refitted as it is there, and by block influence and activation
importance in one shot, tied by averaging («Minitron»). Both are healed on so many tokens; then, from ours, the ways to
train are compared on `--ways-tokens`. What is finished in DIR is used again.
"""

import argparse
from pathlib import Path
from typing import Any

from chains import CALIBRATION, REFERENCE, Branch, cuts, evaluation_options, print_table, run_branches, write_results
from pruning import MINITRON, OURS, REFIT

HEAL = {"stage": "heal", "batch_size": 4, "optimizer": "muon", "learning_rate": 1e-3}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "learning_rate": 5e-4},
    "cross-entropy alone": {"cross_entropy": 1.0},
    "text by the teacher": {"data": "teacher_samples"},
    "the 64 likeliest tokens": {"teacher_top_k": 64},
    "LoRA, rank 16": {"lora": {"rank": 16, "alpha": 32}, "optimizer": "adamw", "learning_rate": 2e-3},
}
QUANTIZE = {"stage": "quantize", "bits": 4, "group_size": 32}


def branches(tokens: list[str], minitron_tokens: list[str], ways_tokens: str) -> dict[str, Branch]:
    """Every start, and every way from it."""
    found: dict[str, Branch] = {
        "ours": [*cuts(OURS), REFIT, {"stage": "tie"}, REFIT],
        "Minitron": [*cuts(MINITRON), {"stage": "tie", "method": "average"}],
    }
    for start, counts in {"ours": tokens, "Minitron": minitron_tokens}.items():
        found |= {f"{start}, {count}": [{"from": start}, HEAL | {"tokens": count}] for count in counts}
    for name, way in WAYS.items():
        found[f"{name}, {ways_tokens}"] = [{"from": "ours"}, HEAL | {"tokens": ways_tokens} | way]
    longest = f"ours, {tokens[-1]}"
    found[f"{longest}, INT4"] = [{"from": longest}, QUANTIZE]
    scales = {"stage": "heal", "tokens": ways_tokens, "batch_size": 4, "learning_rate": 1e-3}
    found[f"{longest}, INT4, scales healed on {ways_tokens}"] = [{"from": f"{longest}, INT4"}, scales]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", default=["100k", "500k", "2M"])
    parser.add_argument("--minitron-tokens", nargs="+", default=["100k", "500k"])
    parser.add_argument("--ways-tokens", default="100k")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-healing"))
    arguments = parser.parse_args()
    calibration = {"source": CALIBRATION, "samples": 128, "sequence_length": 256}
    found = branches(arguments.tokens, arguments.minitron_tokens, arguments.ways_tokens)
    rows = run_branches(arguments.output, REFERENCE, found, calibration, evaluation_options())
    print_table("healing (log increase against Minitron's cut)", rows, unit=rows["Minitron"])
    write_results(arguments.output / "healing.json", rows)


if __name__ == "__main__":
    main()
