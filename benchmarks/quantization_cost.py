"""What quantizing costs as calibration tokens grow, and what the result takes on disk and in memory at phone size.

    python benchmarks/quantization_cost.py [--parts tokens size] [--output DIR] [--layers 24]

`tokens`: INT4 of a Llama-shaped model of 4 layers x 512 with 2k to 128k tokens; the seconds of the walk and those of
search, clipping and rounding. `size`: random weights in the seed article's shape (24 layers, hidden 3072, FFN 12288, 24
heads of 128 with 8 KV heads, vocabulary 151,552, tied): bytes of the checkpoints in 16 bits, INT8 and INT4, and the
resident memory of a process that has loaded each in plain transformers, and after a first forward pass.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from chains import write_results
from quantization_peers import make_llama
from random_models import article_config, write_checkpoint
from rich.console import Console
from rich.table import Table

from autoglm_compress import run
from autoglm_compress.quantization.layer_quantizer import LayerQuantizer

LENGTH = 512
SHORT = 16
"""Of the rows on which plain rounding is checked, which is not what is measured."""
TOKENS = (2048, 8192, 32_768, 131_072)
INT4 = {"stage": "quantize", "name": "int4", "from": "source", "bits": 4, "group_size": 128}
LOADING = """
import json, sys, psutil, torch
from transformers import AutoModelForCausalLM
def resident():
    return psutil.Process().memory_info().rss
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
loaded = resident()
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
print(json.dumps({"imports": before, "loaded": loaded, "after_forward": resident()}))
"""


def run_stages(
    folder: Path, model: Path, stages: list[dict[str, Any]], samples: int, length: int = LENGTH
) -> list[dict[str, Any]]:
    """Run stages on a model; the rows of metrics.json."""
    recipe = {
        "name": "quantization-cost",
        "model": {"source": str(model.resolve())},
        "calibration": {"source": "python-docs", "samples": samples, "sequence_length": length},
        "stages": stages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run(folder / "recipe.yaml", folder / "run", device="cpu", fresh=True, progress=True)
    return [row.as_data() for row in result.rows]


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, noting how long each call takes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    return call


def by_tokens(output: Path) -> list[dict[str, Any]]:
    """Seconds of the stage, and of what in it looks at sums over tokens only."""
    model = make_llama(output / "llama-4x512", 4, 512)
    found = []
    for tokens in TOKENS:
        seconds: list[float] = []
        with patch.object(LayerQuantizer, "quantize", timed(LayerQuantizer.quantize, seconds)):
            rows = run_stages(output / f"tokens-{tokens}", model, [INT4], tokens // LENGTH)
        found.append({"tokens": tokens, "seconds": rows[-1]["seconds"], "search_and_rounding": sum(seconds)})
    table = Table("tokens", "stage", "search and rounding", "walk and the rest", box=None)
    for row in found:
        rest = row["seconds"] - row["search_and_rounding"]
        table.add_row(f"{row['tokens']:,}", *(f"{s:.1f} s" for s in (row["seconds"], row["search_and_rounding"], rest)))
    Console(width=100).print(table, highlight=False)
    return found


def by_size(output: Path, layers: int) -> list[dict[str, Any]]:
    """Bytes on disk and in memory of the phone-sized model."""
    config = article_config(layers, hidden_size=3072, intermediate_size=12_288, heads=24, tied=True)
    model = output / f"phone-{layers}"
    if not (model / "model.safetensors.index.json").exists():
        write_checkpoint(model, config)
    rounding = {"method": "round_to_nearest", "max_divergence": 100.0}
    stages = [INT4 | rounding | {"name": "int8", "bits": 8}, INT4 | rounding]
    rows = run_stages(output / "size", model, stages, samples=1, length=SHORT)
    folders = [model, output / "size" / "run" / "01-int8", output / "size" / "run" / "02-int4"]
    found = []
    for name, row, folder in zip(("bf16", "INT8", "INT4"), rows, folders, strict=True):
        done = subprocess.run([sys.executable, "-c", LOADING, folder], capture_output=True, text=True, check=True)
        found.append({"name": name, "bytes": row["bytes"]} | json.loads(done.stdout.splitlines()[-1]))
    table = Table("", "checkpoint", "of 16 bits", "loaded", "after a forward pass", box=None)
    for row in found:
        memory = [f"{(row[part] - row['imports']) / 1e9:.2f} GB" for part in ("loaded", "after_forward")]
        table.add_row(row["name"], f"{row['bytes'] / 1e9:.2f} GB", f"1/{found[0]['bytes'] / row['bytes']:.2f}", *memory)
    Console(width=100).print(table, highlight=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["tokens", "size"], default=["tokens", "size"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quantization-cost"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if "tokens" in arguments.parts:
        found["tokens"] = by_tokens(arguments.output)
    if "size" in arguments.parts:
        found["size"] = by_size(arguments.output, arguments.layers)
    write_results(arguments.output / "quantization_cost.json", found)


if __name__ == "__main__":
    main()
