"""How the refit depends on calibration tokens, ridge strength, the order of the stages and the calibration text.

    python benchmarks/refit_sensitivity.py [--model FOLDER] [--output DIR] [--data FOLDER] [--parts PART …]

Every row is the whole untied chain at the ratios of recipes/phone9b.yaml, cut only and with the refit, so it shows
whether the refit is ever worse than none. `--data` is a folder with `calib/c4_demo.jsonl` and `text/zh`; without it the
calibration sets that need them are left out.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from chains import (
    CALIBRATION,
    REFERENCE,
    Branch,
    cuts,
    evaluation_options,
    increase,
    print_table,
    run_branches,
    write_results,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoglm_compress.fitting import refit
from autoglm_compress.fitting.ridge import fit

STAGES = ("depth", "heads", "ffn", "width")
TOKENS_PER_INPUT = (0.5, 1, 2, 4, 16)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LENGTH = 64
REFIT = {"stage": "refit"}
QUESTIONS = 10


def chain(order: tuple[str, ...] = STAGES) -> dict[str, Branch]:
    """The chain in some order, cut only and refitted."""
    name = " ".join(order)
    return {name: cuts(dict.fromkeys(order, "")), f"{name} + refit": [{"from": name}, REFIT]}


def by_tokens(model: Path, output: Path) -> dict[str, dict[str, Any]]:
    """The chain with so many calibration tokens per input of the largest linear that is fitted."""
    fan_in = int(0.75 * json.loads((model / "config.json").read_text())["intermediate_size"])
    found: dict[str, dict[str, Any]] = {}
    for factor in TOKENS_PER_INPUT:
        samples = max(2, round(factor * fan_in / LENGTH))
        calibration = {"source": CALIBRATION, "samples": samples, "sequence_length": LENGTH}
        rows = run_branches(output / f"tokens-{factor}", model, chain(), calibration, evaluation_options(QUESTIONS))
        found["source"] = rows["source"]
        for name, row in zip(("cut", "refit"), list(rows.values())[1:], strict=True):
            found[f"{factor} x fan-in ({samples * LENGTH} tokens), {name}"] = row
    return found


def by_strength(model: Path, output: Path) -> dict[str, dict[str, Any]]:
    """The ridge alone, with one strength for all and no choice, at two numbers of tokens."""
    found: dict[str, dict[str, Any]] = {}
    ridge = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}
    for samples in (12, 96):
        calibration = {"source": CALIBRATION, "samples": samples, "sequence_length": LENGTH}
        for strength in (*STRENGTHS, None):
            changed = partial(fit, strengths=(strength,)) if strength else fit
            branches = {"cut": cuts(dict.fromkeys(STAGES, "")), "ridge": [{"from": "cut"}, ridge]}
            with patch.object(refit, "fit", changed):
                rows = run_branches(
                    output / f"strength-{samples}-{strength}",
                    model,
                    branches,
                    calibration,
                    evaluation_options(QUESTIONS),
                )
            found["source"] = rows["source"]
            found[f"{samples * LENGTH} tokens, strength {strength or 'chosen'}"] = rows["ridge"]
    return found


def by_order(model: Path, output: Path) -> dict[str, dict[str, Any]]:
    """The stages in three orders."""
    calibration = {"source": CALIBRATION, "samples": 128, "sequence_length": 256}
    branches: dict[str, Branch] = {}
    for order in (STAGES, ("width", "ffn", "heads", "depth"), ("ffn", "width", "depth", "heads")):
        branches |= chain(order)
    return run_branches(output / "order", model, branches, calibration, evaluation_options(QUESTIONS))


def calibration_sets(model: Path, output: Path, data: Path) -> dict[str, str]:
    """Text sources by name; those that are not there are said to be missing."""
    sets = {"python-docs": "python-docs", "own samples": str(own_samples(model, output / "own_samples.jsonl"))}
    english, chinese = data / "calib" / "c4_demo.jsonl", sorted((data / "text" / "zh").rglob("*.txt"))
    if english.exists() and chinese:
        sets["C4"] = str(english.resolve())
        sets["Chinese"] = str(excerpt(chinese, output / "chinese.txt"))
    else:
        Console().print(f"{data}: no C4 or Chinese text there: left out")
    return sets


def excerpt(files: list[Path], target: Path, characters: int = 60_000) -> Path:
    """The beginnings of some files as one."""
    target.write_text("\n\n".join(file.read_text(encoding="utf-8")[:characters] for file in files))
    return target.resolve()


@torch.no_grad()
def own_samples(model: Path, target: Path, count: int = 192, length: int = 256) -> Path:
    """What the model writes by itself, from the end token on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    begin = torch.full((count, 1), tokenizer.eos_token_id)
    ids = language_model.generate(
        begin, attention_mask=torch.ones_like(begin), max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return target.resolve()


def by_text(model: Path, output: Path, data: Path) -> list[dict[str, Any]]:
    """The chain calibrated on each text, and its perplexity on all of them, cut only and refitted."""
    sets = calibration_sets(model, output, data)
    found = []
    for name, source in sets.items():
        calibration = {"source": source, "samples": 128, "sequence_length": 256}
        for tested, text in sets.items():
            options = evaluation_options(1)
            options["perplexity"] |= {"source": text, "samples": 12}
            rows = run_branches(output / f"text-{name.replace(' ', '-')}", model, chain(), calibration, options)
            original, cut, refitted = rows.values()
            found.append(
                {
                    "calibrated_on": name,
                    "tested_on": tested,
                    "source_perplexity": original["perplexity"],
                    "cut": increase(cut, original),
                    "refit": increase(refitted, original),
                }
            )
    return found


def print_texts(rows: list[dict[str, Any]]) -> None:
    """The increase of log perplexity, cut only and refitted, by calibration text and test text."""
    tested = list(dict.fromkeys(row["tested_on"] for row in rows))
    table = Table("calibrated on", *tested, box=None)
    for name in dict.fromkeys(row["calibrated_on"] for row in rows):
        cells = [f"{row['cut']:.3f} > {row['refit']:.3f}" for row in rows if row["calibrated_on"] == name]
        table.add_row(name, *cells)
    console = Console(width=140)
    console.print("\nincrease of log perplexity by test text, cut only > refitted", style="bold")
    console.print(table, highlight=False)


PARTS = {"tokens": by_tokens, "strength": by_strength, "order": by_order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-sensitivity"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "text"], default=[*PARTS, "text"])
    arguments = parser.parse_args()
    model, output = arguments.model, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for part in arguments.parts:
        if part == "text":
            results[part] = by_text(model, output, arguments.data)
            print_texts(results[part])
        else:
            results[part] = PARTS[part](model, output)
            print_table(part, results[part])
    write_results(output / "refit_sensitivity.json", results)


if __name__ == "__main__":
    main()
