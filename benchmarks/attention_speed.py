"""Speed and memory of decoding with transformers' own cache, with ours, and with sparse attention, in one run.

    python benchmarks/smollm2.py runs/smollm2
    python benchmarks/attention_speed.py runs/smollm2 --lengths 1024 4096

Every variant is given the same random states and takes one step after the other in turn, always at the same length: a
step's token is removed again. The median of its CPU seconds counts, so run it with OMP_NUM_THREADS=1. Those that read
few read max(64, length / 16) tokens and are dense nowhere, so that the table says where they should be. «all» and
«few» are read by our attention function, the others by transformers' own.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from autoglm_compress.attention import PreallocatedCache, SparseAttention

BASE = "transformers"


def _variants(model: Any) -> dict[str, tuple[SparseAttention | None, Any]]:
    """What each variant reads (None with transformers' own attention), and its empty cache."""
    variants: dict[str, tuple[SparseAttention | None, Any]] = {
        BASE: (None, DynamicCache(config=model.config)),
        "16 bits": (None, PreallocatedCache(model.config)),
        "8 bits": (None, PreallocatedCache(model.config, 8)),
    }
    for reading, top_k in (("all", None), ("few", 64)):
        for bits in (16, 8):
            layers = (top_k,) * model.config.num_hidden_layers
            attention = SparseAttention(top_k=layers, dense_below=0, kv_bits=bits)
            variants[f"{bits} bits, {reading}"] = (attention, attention.apply(model))
    return variants


def _nbytes(cache: Any) -> int:
    if isinstance(cache, PreallocatedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def measure(model: Any, length: int, steps: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds of a step and bytes of the cache, by variant."""
    variants, config = _variants(model), model.config
    for layer in range(config.num_hidden_layers):
        states = torch.randn(2, 1, config.num_key_value_heads, length, config.head_dim, dtype=model.dtype)
        for _, cache in variants.values():
            cache.update(*states, layer)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    token = torch.tensor([[1000]])
    for step in range(steps + 1):
        for name, (attention, cache) in variants.items():
            if attention is None:
                model.set_attn_implementation("sdpa")
            else:
                attention.apply(model)
            start = time.process_time()
            model(token, past_key_values=cache)
            if step:  # the first one grows
                seconds[name].append(time.process_time() - start)
            cache.crop(-1)
    return {
        name: {"ms": 1000 * median(seconds[name]), "kv_bytes": _nbytes(cache)} for name, (_, cache) in variants.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    found = {}
    for length in arguments.lengths:
        found[length] = measure(model, length, arguments.steps)
        base = found[length][BASE]
        for name, row in found[length].items():
            gain, memory = base["ms"] / row["ms"], row["kv_bytes"] / base["kv_bytes"] - 1
            print(
                f"{length:6} {name:16} {row['ms']:7.1f} ms {gain:5.2f}x {row['kv_bytes'] / 1e6:8.1f} MB {memory:+.1%}"
            )
    if arguments.output:
        arguments.output.write_text(json.dumps({"dtype": arguments.dtype, "lengths": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
