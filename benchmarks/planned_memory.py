"""The memory that `plan` says each stage needs, and what it takes, in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/planned_memory.py [--models embedded wide] [--stages refit tie] [--output DIR]

Three kinds of models: the embedded one; SmolLM2's shape with few layers, whose vocabulary of 49,152 is most of it, with
and without a head of its own; and a wide one. Weights are random but for the embedded model. Each stage runs alone
through the command line. `measured` is the largest resident set of the whole process, imports and report included,
as the system counts it; `anonymous` is the part of it that is no file's page and that the system cannot take back.

Results go to `planned_memory.json` in the output folder, one by one: the same command goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from chains import REFERENCE, write_results
from random_models import write_checkpoint
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

MODELS: dict[str, dict[str, Any]] = {
    "embedded": {},
    "vocabulary": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "vocabulary-tied": {"tie_word_embeddings": True},
    "wide": {
        "vocab_size": 32_000,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
    },
}
MODELS["vocabulary-tied"] |= MODELS["vocabulary"]
SAMPLES = 24
"""Rows of 256 tokens: more than one batch."""
HEAL = {"stage": "heal", "tokens": 2048, "batch_size": 4, "sequence_length": 256, "checks": 1}
QUANTIZE = {"stage": "quantize", "group_size": 64, "max_divergence": 1e9}
STAGES: dict[str, dict[str, Any]] = {
    "depth": {"stage": "depth", "num_hidden_layers": "0.5x"},
    "depth greedy": {"stage": "depth", "method": "greedy_loss"},
    "heads": {"stage": "heads", "num_attention_heads": 6},
    "ffn": {"stage": "ffn", "intermediate_size": "0.75x"},
    "width": {"stage": "width", "hidden_size": "0.75x"},
    "width channels": {"stage": "width", "hidden_size": "0.75x", "method": "activation"},
    "tie": {"stage": "tie"},
    "tie, fitted": {"stage": "tie", "passes": 1},
    "refit": {"stage": "refit", "layer_passes": 1, "logit_passes": 1},
    "refit, ridge": {"stage": "refit", "layer_passes": 0, "logit_passes": 0},
    "heal adamw": HEAL | {"optimizer": "adamw"},
    "heal muon": HEAL | {"optimizer": "muon", "residual": 1},
    "heal top 64": HEAL | {"teacher_top_k": 64},
    "int4": QUANTIZE | {"bits": 4},
    "int4 scales": QUANTIZE | {"bits": 4, "error_feedback": False},
    "int4 nearest": QUANTIZE | {"bits": 4, "method": "round_to_nearest"},
    "int8 nearest": QUANTIZE | {"bits": 8, "method": "round_to_nearest"},
    "mixed": QUANTIZE | {"bits": "auto", "budget": {"average_bits": 5}},
    "evaluate": {"stage": "evaluate", "tasks": ["perplexity"]},
}
LEAST, MOST = 1.0, 1.25
"""What the plan is to be, as a multiple of what is measured."""
SAMPLE_SECONDS = 0.01


def model_folder(name: str, output: Path) -> Path:
    """The embedded model, or one with random weights that is written if it is not there."""
    if not MODELS[name]:
        return REFERENCE
    config = LlamaConfig(**MODELS[name], dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=0)
    config.pad_token_id = config.eos_token_id = 0
    write_checkpoint(output / "models" / name, config)
    return output / "models" / name


def write_recipe(folder: Path, source: Path, stage: dict[str, Any]) -> Path:
    """A recipe of one stage; what is removed greedily is one layer."""
    if stage.get("method") == "greedy_loss":
        stage = stage | {"num_hidden_layers": json.loads((source / "config.json").read_text())["num_hidden_layers"] - 1}
    recipe = {
        "name": "planned-memory",
        "model": {"source": str(source)},
        "calibration": {"samples": SAMPLES, "sequence_length": 256},
        "evaluation": {"perplexity": {"samples": SAMPLES, "sequence_length": 256}},
        "stages": [stage],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def planned_bytes(recipe: Path) -> int | str:
    """What `plan` says of the stage, or why it refuses it."""
    found = subprocess.run([*COMMAND, "plan", str(recipe), "--json"], capture_output=True, text=True)
    if found.returncode:
        return " ".join(found.stderr.split())[-200:]
    return json.loads(found.stdout)["checkpoints"][1]["peak_memory_bytes_estimate"]


COMMAND = [sys.executable, "-m", "autoglm_compress"]


def run_measured(recipe: Path, run: Path) -> dict[str, Any]:
    """The largest resident set of a process that runs a recipe, and the part of it that is no file's page."""
    began, anonymous = time.monotonic(), 0
    with (recipe.parent / "log.txt").open("w") as log:
        child = subprocess.Popen([*COMMAND, "run", str(recipe), "--output", str(run)], stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(SAMPLE_SECONDS)
    if status:
        sys.exit(f"{recipe}: the run failed, see {recipe.parent / 'log.txt'}")
    [record] = run.glob("01-*/stage.json")
    stage = json.loads(record.read_text())["peak_rss_bytes"]
    found = {"measured": 1024 * usage.ru_maxrss, "anonymous": anonymous, "stage": stage}
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """A row for each stage; for each model MB planned and measured, and the ratio."""
    models = [name for name in MODELS if any(key.startswith(f"{name}/") for key in results)]
    table = Table("stage", *models, box=None)
    for stage in STAGES:
        cells = []
        for model in models:
            found = results.get(f"{model}/{stage}")
            if not found or "measured" not in found:
                cells.append("-" if found else "")
                continue
            ratio = found["planned"] / found["measured"]
            mark = "" if LEAST <= ratio <= MOST else " !"
            cells.append(f"{found['planned'] / 1e6:,.0f} / {found['measured'] / 1e6:,.0f} = {ratio:.2f}{mark}")
        table.add_row(stage, *cells)
    Console(width=160).print(table, highlight=False)
    print("MB planned / measured; ! where the ratio is not from 1 to 1.25, - where the stage cannot be had")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--plan-only", action="store_true", help="plan again, and take what was measured before")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-planned-memory"))
    arguments = parser.parse_args()
    file = arguments.output / "planned_memory.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for model in arguments.models:
        source = model_folder(model, arguments.output.resolve())
        for stage in arguments.stages:
            key = f"{model}/{stage}"
            if key in results and not arguments.plan_only:
                continue
            folder = arguments.output / "work"
            folder.mkdir(parents=True, exist_ok=True)
            recipe = write_recipe(folder, source, STAGES[stage])
            planned = planned_bytes(recipe)
            if isinstance(planned, str):
                results[key] = {"refused": planned}
            elif arguments.plan_only:
                results[key] = results.get(key, {}) | {"planned": planned}
            else:
                shutil.rmtree(folder / "run", ignore_errors=True)
                results[key] = {"planned": planned} | run_measured(recipe, folder / "run")
            write_results(file, results)
    print_table(results)


if __name__ == "__main__":
    main()
