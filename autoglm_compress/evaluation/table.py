"""What `evaluate` prints."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from autoglm_compress.evaluation.command import AGREEMENT
from autoglm_compress.evaluation.generate import METRIC
from autoglm_compress.records.evaluation import EvaluationRecord
from autoglm_compress.records.task_results import RECORDS, without_records


def evaluation_table(record: EvaluationRecord) -> Table:
    """The results as a table that fits 80 columns: MMLU by category and in all, and the other tasks."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    table.add_column("")
    for heading in ("value", "± stderr", "of"):
        table.add_column(heading, justify="right")
    for task, entry in record.tasks.items():
        result = entry.result
        if task == "mmlu":
            for name, part in (result["categories"] or result["subjects"]).items():
                table.add_row(escape(name), *_accuracy(part))
            table.add_row("mmlu", *_accuracy(result))
        elif task == "perplexity":
            spread = "" if result["stderr"] is None else f"{result['stderr']:.2f}"
            table.add_row("perplexity", f"{result['value']:.2f}", spread, f"{result['tokens']:,} tokens")
        elif task == "generate":
            answers = len(result[RECORDS]["values"][METRIC])
            table.add_row("generate", *_share(result[METRIC], result[f"{METRIC}_stderr"]), f"{answers:,} answers")
        elif task == AGREEMENT:
            table.add_row("divergence", f"{result['divergence']:.4f} nats", "", f"{result['tokens']:,} tokens")
            table.add_row("same top token", f"{100 * result['top1']:.1f}%", "", f"{result['tokens']:,} tokens")
        else:
            for metric, value in without_records(result).items():
                if "_stderr" not in metric:
                    stderr = result.get(_stderr_name(metric))
                    table.add_row(escape(f"{task} {metric}"), f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}")
    return table


def _stderr_name(metric: str) -> str:
    """What lm-eval calls the standard error of a metric, `acc` or `acc,filter`."""
    name, comma, chosen = metric.partition(",")
    return f"{name}_stderr{comma}{chosen}"


def _accuracy(part: Mapping[str, Any]) -> tuple[str, str, str]:
    return *_share(part["accuracy"], part["stderr"]), f"{part['questions']:,} questions"


def _share(value: float, stderr: float | None) -> tuple[str, str]:
    """A share and its standard error, in percent."""
    return f"{100 * value:.1f}%", "" if stderr is None else f"{100 * stderr:.1f}"
