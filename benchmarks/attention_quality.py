"""What reading few tokens and rounding the cache change in a real model's predictions, and whether it finds needles.

    python benchmarks/smollm2.py runs/smollm2
    python benchmarks/attention_quality.py runs/smollm2 book.txt article.txt --length 2048

Of every text, one row of so many tokens is read as if decoded token by token, with no token dense. Needles are numbers
of five digits, hidden in the text and asked for at its end. A digit counts if it is the likeliest next token.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoglm_compress.attention import SparseAttention
from autoglm_compress.attention.dynamic_sparse import set_options

POLICIES: dict[str, dict[str, Any]] = {
    "8 bits, all": {"top_k": None, "kv_bits": 8},
    "16 bits, 64": {"top_k": 64, "kv_bits": 16},
    "8 bits, 64": {"top_k": 64, "kv_bits": 8},
    "8 bits, 128": {"top_k": 128, "kv_bits": 8},
    "8 bits, 256": {"top_k": 256, "kv_bits": 8},
    "window of 80": {"top_k": 1, "window": 79, "kv_bits": 16, "adaptive": False},
}
"""The numbers are of tokens up to a length of 1,024, and grow in proportion beyond."""
DEPTHS = (0.1, 0.5, 0.9)


def _set(model: Any, policy: dict[str, Any]) -> None:
    layers = model.config.num_hidden_layers
    attention = SparseAttention(**(policy | {"top_k": (policy["top_k"],) * layers, "dense_below": 0}))
    attention.apply(model)
    set_options(model, lambda layer: attention.layer(layer, every_query=True))


def _rows(tokenizer: Any, texts: list[Path], length: int) -> list[tuple[list[int], list[list[int]]]]:
    """For each text, a row of it, and rows of it with a needle each that end in the needle's digits."""
    found = []
    for number, file in enumerate(texts):
        ids = tokenizer(file.read_text(encoding="utf-8")[: 8 * length], add_special_tokens=False)["input_ids"]
        needles = []
        for depth in DEPTHS:
            digits = str(random.Random(f"{number} {depth}").randrange(10_000, 100_000))
            needle = tokenizer(f"\nThe secret code is {digits}.\n")["input_ids"]
            asked = tokenizer(f"\nRemember: the secret code is {digits}")["input_ids"]
            room = length - len(needle) - len(asked)
            place = int(room * depth)
            needles.append(ids[:place] + needle + ids[place:room] + asked)
        found.append((ids[:length], needles))
    return found


@torch.no_grad()
def measure(model: Any, rows: list[tuple[list[int], list[list[int]]]]) -> dict[str, dict[str, float]]:
    """KL divergence from dense attention, and the share of digits that are found, by policy."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"kl": [], "same": [], "digits": []} for name in ("dense", *POLICIES)
    }
    for text, needles in rows:
        expected = None
        for name, results in found.items():
            if name == "dense":
                model.set_attn_implementation("sdpa")
            else:
                _set(model, POLICIES[name])
            likely = model(torch.tensor([text]), use_cache=False).logits[0].float().log_softmax(-1)
            expected = likely if expected is None else expected
            results["kl"].append(float((expected.exp() * (expected - likely)).sum(-1).mean()))
            results["same"].append(float((expected.argmax(-1) == likely.argmax(-1)).float().mean()))
            for row in needles:
                logits = model(torch.tensor([row]), use_cache=False, logits_to_keep=6).logits[0, :-1]
                results["digits"].append(float((logits.argmax(-1) == torch.tensor(row[-5:])).float().mean()))
            print(name, {key: round(fmean(values), 4) for key, values in results.items()}, flush=True)
    return {name: {key: fmean(values) for key, values in results.items()} for name, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    found = measure(model, _rows(tokenizer, arguments.texts, arguments.length))
    if arguments.output:
        arguments.output.write_text(json.dumps({"length": arguments.length, "policies": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
