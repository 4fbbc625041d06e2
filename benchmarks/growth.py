"""How time and memory of the stages grow with layers, width and calibration tokens, each fitted with its exponent.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--output DIR]

Random models with few words, so that layers are all there is; one of the three sizes is changed at a time. An exponent
of 1 says that twice as much takes twice as long; what is fixed for a run (imports, tokenizing) keeps it below that.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from chains import REFERENCE, write_results
from random_models import article_config, write_checkpoint
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from autoglm_compress import run

LENGTH = 256
BASE = {"layers": 2, "hidden": 512, "tokens": 4096}
SIZES = {"layers": (4, 8, 16, 36), "tokens": (2048, 8192, 32_768), "hidden": (1024, 2048, 4096)}
STAGES: list[dict[str, Any]] = [
    {"stage": "heads", "num_attention_heads": "0.75x", "kv_heads": "0.75x"},
    {"stage": "ffn", "intermediate_size": "0.75x"},
    {"stage": "width", "hidden_size": "0.75x"},
    {"stage": "refit", "layer_passes": 0, "logit_passes": 0},
    {"stage": "quantize", "name": "int4", "bits": 4, "group_size": 64},
]
"""`heads` is where the statistics are measured."""


def measured(output: Path, layers: int, hidden: int, tokens: int) -> list[dict[str, Any]]:
    """The rows of metrics.json for the stages on a model of some size; FFNs are four times as wide as the stream."""
    model = output / f"source-{layers}-{hidden}"
    words = -(-len(AutoTokenizer.from_pretrained(REFERENCE)) // 64) * 64
    heads = hidden // 128
    write_checkpoint(model, article_config(layers, hidden, 4 * hidden, heads, heads, vocab_size=words))
    recipe = {
        "name": "growth",
        "model": {"source": str(model.resolve())},
        "calibration": {"source": "python-docs", "samples": tokens // LENGTH, "sequence_length": LENGTH},
        "keep": "none",
        "stages": STAGES,
    }
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run(output / "recipe.yaml", output / "run", device="cpu", fresh=True, progress=True)
    return [row.as_data() for row in result.rows[1:]]


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of the line through the logarithms."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-growth"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "base": BASE, "growth": {}}
    table = Table("stage", "grows with", "CPU seconds", "exponent", "peak GiB", "exponent", box=None)
    for what, sizes in SIZES.items():
        runs = [measured(arguments.output, **(BASE | {what: size})) for size in sizes]
        for rows in zip(*runs, strict=True):
            seconds, memory = ([row[field] for row in rows] for field in ("cpu_seconds", "peak_rss_bytes"))
            found = {"sizes": sizes, "cpu_seconds": seconds, "peak_rss_bytes": memory}
            found |= {"time_exponent": exponent(sizes, seconds), "memory_exponent": exponent(sizes, memory)}
            results["growth"].setdefault(rows[0]["name"], {})[what] = found
            table.add_row(
                rows[0]["name"],
                f"{what} {', '.join(map(str, sizes))}",
                ", ".join(f"{value:.1f}" for value in seconds),
                f"{found['time_exponent']:.2f}",
                ", ".join(f"{value / 2**30:.2f}" for value in memory),
                f"{found['memory_exponent']:.2f}",
            )
        write_results(arguments.output / "growth.json", results)
    Console(width=120).print(table, highlight=False)


if __name__ == "__main__":
    main()
