"""Width, FFN, heads and the refit at the exact size of the seed article, on as many layers as wanted.

    python benchmarks/article_shape.py [--layers 2] [--tokens 4096] [--output DIR]

Random weights in the shape hidden 4096 -> 3072, FFN 16384 -> 12288, 32 -> 24 heads, vocabulary 151,552, bf16, untied:
for time and memory, not for quality. Prints seconds and peak resident memory of every stage, and seconds per layer.
"""

import argparse
from pathlib import Path

import torch
import yaml
from chains import write_results
from random_models import article_config, matmul_peak, write_checkpoint
from rich.console import Console
from rich.table import Table

from autoglm_compress import run

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--logit-passes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-article-shape"))
    arguments = parser.parse_args()
    peak = matmul_peak()
    source = arguments.output / f"source-{arguments.layers}"
    if not (source / "model.safetensors.index.json").exists():
        write_checkpoint(source, article_config(arguments.layers))
    recipe = {
        "name": "article-shape",
        "model": {"source": str(source.resolve())},
        "calibration": {
            "source": "python-docs",
            "samples": arguments.tokens // LENGTH,
            "sequence_length": LENGTH,
        },
        "stages": [
            {"stage": "heads", "num_attention_heads": 24},
            {"stage": "ffn", "intermediate_size": 12_288},
            {"stage": "width", "hidden_size": 3072},
            {"stage": "refit", "logit_passes": arguments.logit_passes},
        ],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    output = arguments.output / f"run-{arguments.layers}-{arguments.tokens}"
    result = run(arguments.output / "recipe.yaml", output, device="cpu", fresh=True, progress=True)
    rows = [row.as_data() for row in result.rows]
    table = Table("stage", "parameters", "seconds", "seconds per layer", "peak memory", box=None)
    for row in rows[1:]:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:,.0f}M",
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / arguments.layers:.1f}",
            f"{row['peak_rss_bytes'] / 2**30:.2f} GiB",
        )
    console = Console(width=120)
    console.print(f"{arguments.layers} layers, {arguments.tokens} tokens, fp32 matmul peak {peak:.0f} GFLOP/s")
    console.print(table, highlight=False)
    name = f"article_shape-{arguments.layers}-{arguments.tokens}.json"
    write_results(arguments.output / name, {"matmul_gflops": peak, "threads": torch.get_num_threads(), "stages": rows})


if __name__ == "__main__":
    main()
