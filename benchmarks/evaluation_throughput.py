"""MMLU-style questions per second: this package's evaluation against stock lm-eval, on the same tasks in one run.

    python benchmarks/evaluation_throughput.py [--model FOLDER] [--mmlu FOLDER] [--limit 5] [--batch-size 8]

Both sides score lm-eval's own requests for the same questions in fp32: stock with `HFLM`, the whole model in memory, in
the batches asked for; ours layer by layer. Prints questions per second, peak memory so far (ours runs first), and the
largest difference of a log-likelihood.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import psutil
import torch
from chains import QUIZ, REFERENCE, write_results
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

from autoglm_compress import Checkpoint
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from autoglm_compress.evaluation.mmlu import chosen_questions, mmlu_group
from autoglm_compress.progress import Progress
from autoglm_compress.runtime import Runtime

FEWSHOT = 5


def measure(lm: LM, folder: Path, limit: int) -> dict[str, Any]:
    """Seconds, accuracy and log-likelihoods of the questions."""
    group = mmlu_group(folder, FEWSHOT, None)
    samples = chosen_questions(group, limit)
    loaded = {"groups": {group.name: group}, "tasks": {task.task_name: task for task in group.get_all_tasks()}}
    began = time.perf_counter()
    raw = lm_eval.evaluator.evaluate(lm, loaded, samples=samples, bootstrap_iters=0)
    seconds = time.perf_counter() - began
    scores = [
        value
        for name in sorted(samples)
        for sample in raw["samples"][name]
        for value, _ in (response[0] for response in sample["resps"])
    ]
    return {
        "seconds": seconds,
        "questions": len(scores) // 4,
        "accuracy": raw["results"][group.name]["acc,none"],
        "peak_rss_bytes": psutil.Process().memory_info().rss,
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--mmlu", type=Path, default=QUIZ)
    parser.add_argument("--limit", type=int, default=5, help="questions of each subject")
    parser.add_argument("--batch-size", type=int, default=8, help="of stock lm-eval")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-evaluation"))
    arguments = parser.parse_args()
    device = torch.device("cpu")
    ours = LayerwiseLM(Checkpoint(arguments.model), runtime=Runtime(device, Progress(Console())), title="evaluate")
    found = {"ours": measure(ours, arguments.mmlu, arguments.limit)}
    stock = HFLM(str(arguments.model), device="cpu", dtype="float32", batch_size=arguments.batch_size)
    found["lm-eval"] = measure(stock, arguments.mmlu, arguments.limit)
    pairs = zip(found["ours"].pop("scores"), found["lm-eval"].pop("scores"), strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    table = Table("", "questions", "seconds", "questions/s", "accuracy", "resident", box=None)
    for name, row in found.items():
        rate, memory = row["questions"] / row["seconds"], row["peak_rss_bytes"] / 2**20
        cells = f"{row['seconds']:.1f}", f"{rate:.2f}", f"{100 * row['accuracy']:.1f}%", f"{memory:.0f} MiB"
        table.add_row(name, str(row["questions"]), *cells)
    console = Console(width=100)
    console.print(table, highlight=False)
    ratio = found["lm-eval"]["seconds"] / found["ours"]["seconds"]
    console.print(f"ours is {ratio:.2f} x as fast; log-likelihoods differ by {difference:.2g} at most", highlight=False)
    write_results(arguments.output / "evaluation_throughput.json", {"rows": found, "largest_difference": difference})


if __name__ == "__main__":
    main()
