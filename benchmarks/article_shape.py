"""Width, FFN, heads and the refit at the exact size of the seed article, on as many layers as wanted.

    python benchmarks/article_shape.py [--layers 2] [--tokens 4096] [--output DIR]

Random weights in the shape hidden 4096 -> 3072, FFN 16384 -> 12288, 32 -> 24 heads, vocabulary 151,552, bf16, untied:
for time and memory, not for quality. Prints seconds and peak resident memory of every stage, and seconds per layer.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import yaml
from chains import REFERENCE, write_results
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoTokenizer, GlmConfig

from autoglm_compress.architecture import ModelShape, family_of
from autoglm_compress.pipeline import RunOptions, run_recipe
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import load_recipe

LENGTH = 512
CALIBRATION_SPEED_SIZE = 4096


def article_config(
    layers: int, hidden_size: int = 4096, intermediate_size: int = 16_384, heads: int = 32, tied: bool = False
) -> GlmConfig:
    """The seed article's source, or what becomes of it."""
    return GlmConfig(
        vocab_size=151_552,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["GlmForCausalLM"],
    )


def write_checkpoint(folder: Path, config: GlmConfig) -> None:
    """A checkpoint of random weights, written tensor by tensor; activations stay finite."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    shape = ModelShape.of(family_of(json.loads((folder / "config.json").read_text()), "config.json"), config)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, (name, size) in enumerate(shape.tensors()):
        tensor = torch.empty(size, dtype=torch.bfloat16)
        if len(size) == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            tensor.normal_(0, size[1] ** -0.5, generator=generator)
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def matmul_peak() -> float:
    """fp32 GFLOP/s of a large product here, the best of three."""
    a, b = torch.randn(2, CALIBRATION_SPEED_SIZE, CALIBRATION_SPEED_SIZE)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * CALIBRATION_SPEED_SIZE**3 / best / 1e9


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
    output = RunOptions(arguments.output / f"run-{arguments.layers}-{arguments.tokens}", device="cpu", fresh=True)
    result = run_recipe(load_recipe(arguments.output / "recipe.yaml"), output, Progress(Console()))
    rows = json.loads((result / "metrics.json").read_text())["stages"]
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
