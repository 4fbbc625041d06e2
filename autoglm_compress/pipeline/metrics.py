"""Costs and measurements of a run: one row per stage, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from autoglm_compress.architecture.shape import PARTS
from autoglm_compress.records.files import SOURCE
from autoglm_compress.records.metrics import Row
from autoglm_compress.records.plan import PlannedStage, PlanRecord
from autoglm_compress.records.stage import Shape
from autoglm_compress.report.numbers import human

MEASURES = {"perplexity": ("perplexity", "value"), "accuracy": ("mmlu", "accuracy")}


def row(
    name: str,
    stage: str,
    shape: Shape,
    counts: dict[str, int],
    file_bytes: int,
    resources: dict[str, Any],
    results: dict[str, Any],
    source: Row | None,
    previous: Row | None,
) -> Row:
    """One row of `metrics.json`; `counts` are of parameters. Deltas are taken against `source` and `previous`."""
    measures: dict[str, Any] = {}
    for measure, (task, field) in MEASURES.items():
        value = results.get(task, {}).get(field)
        measures[measure] = value
        for against, other in (("source", source), ("previous", previous)):
            reference = other and getattr(other, measure)
            known = value is not None and reference is not None
            measures[f"{measure}_delta_{against}"] = value - reference if known else None
    return Row(
        name=name,
        stage=stage,
        shape=shape,
        **counts,
        bytes=file_bytes,
        **resources,
        **measures,
        evaluations=results,
    )


def metrics_table(rows: Sequence[Row]) -> Table:
    """The rows as a table that fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("stage")
    counts = _counts(rows)
    for heading in (*counts.values(), "size", "perplexity", "x source", "accuracy", "delta", "time", "peak"):
        table.add_column(heading, justify="right")
    base = rows[0].perplexity if rows else None
    for entry in rows:
        perplexity, accuracy, delta = entry.perplexity, entry.accuracy, entry.accuracy_delta_source
        table.add_row(
            entry.name,
            *(_written(getattr(entry, field)) for field in counts),
            _written(entry.bytes, "B"),
            "" if perplexity is None else f"{perplexity:.2f}",
            "" if perplexity is None or not base else f"{perplexity / base:.3f}",
            "" if accuracy is None else f"{100 * accuracy:.1f}%",
            "" if delta is None or entry.name == SOURCE else f"{100 * delta:+.1f}",
            f"{entry.seconds:.1f}s",
            _written(entry.peak_rss_bytes, "B"),
        )
    return table


def _counts(rows: Sequence[Row | PlannedStage]) -> dict[str, str]:
    """The columns of parameters with their headings: two where a shared adapter counts twice in one of them."""
    shared = any(entry.unique_parameters != entry.parameters for entry in rows)
    return {"parameters": "params"} | ({"unique_parameters": "unique"} if shared else {})


def _written(number: int | None, unit: str = "") -> str:
    return "" if number is None else human(number) + unit


def plan_table(plan: PlanRecord) -> Table:
    """A plan as a table that fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("stage")
    counts = _counts(plan.checkpoints)
    for heading in ("layers", "hidden", "FFN", "heads/KV", "dim", *counts.values(), "disk", "KV/1k", "RAM"):
        table.add_column(heading, justify="right")
    for entry in plan.checkpoints:
        shape = entry.shape
        table.add_row(
            entry.name,
            str(shape.num_hidden_layers),
            str(shape.hidden_size),
            str(shape.intermediate_size),
            f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
            str(shape.head_dim),
            *(human(getattr(entry, field)) for field in counts),
            human(entry.bytes if entry.stage == SOURCE else entry.disk_bytes) + "B"
            if entry.disk_bytes or entry.stage == SOURCE
            else "",
            human(entry.kv_cache_bytes_per_1000_tokens) + "B",
            human(entry.peak_memory_bytes_estimate) + "B" if entry.peak_memory_bytes_estimate else "",
        )
    return table


def parts_lines(plan: PlanRecord) -> list[str]:
    """Of a model with towers beside the text, the parameters by part with shares: the source's and the last one's."""
    ends = [plan.checkpoints[0], plan.checkpoints[-1]]
    return [f"{entry.name}: {_parts(entry)}" for entry in ends if entry.parameters_by_part.keys() - {*PARTS, "other"}]


def _parts(entry: PlannedStage) -> str:
    within = {"attention", "ffn", "norms", "other"}
    outside = {part: count for part, count in entry.parameters_by_part.items() if part not in within and count}
    parts = {"text layers": entry.parameters - sum(outside.values())} | outside
    return ", ".join(f"{part} {human(count)} ({count / entry.parameters:.1%})" for part, count in parts.items())
