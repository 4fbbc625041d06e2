"""What the benchmarks share: recipes whose branches start from one source, run once, and tables of the result."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from autoglm_compress import run

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "reference_model" / "checkpoint"
QUIZ = ROOT / "calib_data" / "quiz"
CALIBRATION = {"python-docs": 3, str(ROOT / "calib_data" / "quiz_prompts.jsonl"): 1}
SIZES: dict[str, dict[str, Any]] = {
    "depth": {"num_hidden_layers": "0.6667x"},
    "heads": {"num_attention_heads": "0.75x"},
    "ffn": {"intermediate_size": "0.75x"},
    "width": {"hidden_size": "0.75x"},
}
"""The ratios of recipes/phone9b.yaml."""

Branch = list[dict[str, Any]]


def sizes_for(model: Path) -> dict[str, dict[str, Any]]:
    """The sizes to cut to; whole KV groups where three quarters of the heads cannot be shared out among all."""
    config = json.loads((model / "config.json").read_text())
    uneven = 0.75 * config["num_attention_heads"] % config["num_key_value_heads"]
    return SIZES | {"heads": SIZES["heads"] | ({"kv_heads": "0.75x"} if uneven else {})}


def cuts(methods: dict[str, str], sizes: dict[str, dict[str, Any]] = SIZES) -> Branch:
    """The surgeries that are named, in order, each by a method; "" for the default."""
    return [
        {"stage": stage} | sizes[stage] | ({"method": method} if method else {}) for stage, method in methods.items()
    ]


def run_branches(
    output: Path, model: Path, branches: dict[str, Branch], calibration: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Run branches from one source in one recipe, and evaluate the end of each.

    A branch may begin with `{"from": NAME}`: it goes on where another one ended.

    Returns:
        The row of metrics.json for the end of each branch, and for the source; `seconds` are those of its own stages.
    """
    stages: Branch = []
    ends: dict[str, str] = {}
    for number, (name, branch) in enumerate(branches.items()):
        parent = "source"
        if "from" in branch[0]:
            parent, branch = ends[branch[0]["from"]], branch[1:]
        for step, stage in enumerate(branch):
            label = f"{number}-{step}-{stage['stage']}"
            stages.append(stage | {"name": label, "from": parent})
            parent = label
        ends[name] = parent
        stages.append({"stage": "evaluate", "name": f"{number}-end", "tasks": ["perplexity", "mmlu"]})
    recipe = {
        "name": output.name,
        "model": {"source": str(model.resolve())},
        "calibration": calibration,
        "evaluation": evaluation,
        "stages": stages,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run(output / "recipe.yaml", output / "run", progress=True)
    rows = {row.name.split("-", 1)[-1]: row.as_data() for row in result.rows}
    found = {"source": rows["source"]}
    for number, name in enumerate(branches):
        own = [row["seconds"] for label, row in rows.items() if label.startswith(f"{number}-") and "end" not in label]
        peak = max(row["peak_rss_bytes"] for label, row in rows.items() if label.startswith(f"{number}-"))
        found[name] = rows[f"{number}-end"] | {"seconds": sum(own), "peak_rss_bytes": peak}
    return found


def evaluation_options(questions: int = 20) -> dict[str, Any]:
    """Held-out python-docs and so many quiz questions of each subject."""
    return {
        "perplexity": {"samples": 64, "sequence_length": 256, "source": "python-docs"},
        "mmlu": {"data": str(QUIZ), "limit": questions},
    }


def increase(row: dict[str, Any], source: dict[str, Any]) -> float:
    """How much the logarithm of perplexity rose."""
    return math.log(row["perplexity"] / source["perplexity"])


def print_table(title: str, rows: dict[str, dict[str, Any]], unit: dict[str, Any] | None = None) -> None:
    """Perplexity against the source, the increase of its logarithm against that of one row, quiz, cost."""
    source = rows["source"]
    table = Table(
        "", "params", "perplexity", "x source", "log increase", "of baseline", "quiz", "lost", "seconds", box=None
    )
    for name, row in rows.items():
        rise = increase(row, source)
        share = f"{100 * rise / increase(unit, source):.0f}%" if unit else ""
        lost = 100 * (source["accuracy"] - row["accuracy"])
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / source['perplexity']:.3f}",
            f"{rise:.3f}",
            share,
            f"{100 * row['accuracy']:.1f}%",
            f"{lost:.1f}",
            f"{row['seconds']:.0f}" if name != "source" else "",
        )
    console = Console(width=140)
    console.print(f"\n{title}", highlight=False, style="bold")
    console.print(table, highlight=False)


def write_results(path: Path, data: Any) -> None:
    """Results as JSON, for machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
