"""CPU time of the attention of one step of decoding, by KV heads and length: 24 query heads of 128, bf16 states.

    OMP_NUM_THREADS=1 python benchmarks/attention_steps.py --output runs/attention_steps.json

Per shape, all variants take one step after the other in turn, and the median counts. `sdpa` is transformers' own
function on a cache that it need not copy, `grouped` the same without repeating KV heads. The sparse variants read
max(64, length / 16) tokens, the last 16 and the first.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from autoglm_compress.attention.cache_layers import PreallocatedLayer
from autoglm_compress.attention.dynamic_sparse import OPTIONS, dynamic_sparse_attention
from autoglm_compress.attention.settings import AttentionOptions, LayerAttention

HEADS, WIDTH = 24, 128
DENSE = LayerAttention(None, AttentionOptions())
SPARSE = LayerAttention(64, AttentionOptions(dense_below=0))


def _module(layer: LayerAttention | None, kv_heads: int) -> nn.Module:
    module = nn.Module().eval()
    module.num_key_value_groups = HEADS // kv_heads
    setattr(module, OPTIONS, layer)
    return module


@torch.no_grad()
def measure(kv_heads: int, length: int, steps: int) -> dict[str, float]:
    """CPU milliseconds of a step, by variant."""
    query = torch.randn(1, HEADS, 1, WIDTH, dtype=torch.bfloat16)
    states = torch.randn(2, 1, kv_heads, length, WIDTH, dtype=torch.bfloat16)
    plain, rounded = (PreallocatedLayer(bits, as_kept=True).update(*states) for bits in (16, 8))
    plainly, dense, sparse = (_module(layer, kv_heads) for layer in (None, DENSE, SPARSE))
    variants: dict[str, Callable[[], object]] = {
        "sdpa": lambda: sdpa_attention_forward(plainly, query, *plain, None),
        "grouped": lambda: dynamic_sparse_attention(dense, query, *plain, None),
        "16 bits, sparse": lambda: dynamic_sparse_attention(sparse, query, *plain, None),
        "8 bits": lambda: dynamic_sparse_attention(dense, query, *rounded, None),
        "8 bits, sparse": lambda: dynamic_sparse_attention(sparse, query, *rounded, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(steps + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if step:  # the first one compiles
                seconds[name].append(time.process_time() - start)
    return {name: 1000 * median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[24, 8, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096, 16384])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for kv_heads in arguments.kv_heads:
        for length in arguments.lengths:
            found = measure(kv_heads, length, arguments.steps)
            rows.append({"kv_heads": kv_heads, "length": length, "milliseconds": found})
            best = min(found["sdpa"], found["grouped"])
            gains = ", ".join(f"{name} {value:.2f} ms ({best / value:.2f}x)" for name, value in found.items())
            print(f"{kv_heads:3} KV heads, {length:6}: {gains}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
