"""The tables of a run: stages, subjects and categories against the source, and other tasks."""

from collections.abc import Iterable
from typing import Any

from autoglm_compress.records.metrics import Row
from autoglm_compress.records.task_results import Scores
from autoglm_compress.report.accuracy_change import change
from autoglm_compress.report.chain import checkpoints
from autoglm_compress.report.numbers import KV_TOKENS, duration, human, percent, plain, points, signed, size, two_places
from autoglm_compress.report.run_record import Run
from autoglm_compress.report.tables import Cell, Column, Table, number_cell, text_cell, without_empty_columns

OURS = ("perplexity", "mmlu")
STAGE_COLUMNS = [
    Column("stage", "stage", numeric=False),
    Column("kind", "kind", numeric=False),
    Column("parameters", "parameters"),
    Column("unique_parameters", "unique", "Parameters, a shared adapter counted once."),
    Column("bytes", "size", "All files of weights."),
    Column("kv_cache_bytes", "KV cache", f"16-bit, of {KV_TOKENS} tokens."),
    Column("perplexity", "perplexity", "On held-out text; lower is better."),
    Column("perplexity_delta", "Δ perplexity", "Against the source."),
    Column("accuracy", "accuracy", "Of multiple choice, few-shot."),
    Column("accuracy_delta", "Δ accuracy", "Points against the source, ± the standard error over the same questions."),
    Column("kl_divergence", "KL", "Nats from the predictions of the checkpoint before, on held-out text."),
    Column("same_next_token", "same token", "How often both find the same next token likeliest."),
    Column("seconds", "time", "Of the stage; of the evaluation for the source and where a stage only evaluates."),
    Column("peak_rss_bytes", "peak memory"),
]


def stage_table(run: Run) -> Table:
    """A row for the source and each stage."""
    rows = []
    for row in run.rows:
        stage = run.stages.get(row.name)
        agreement = stage.decisions.get("agreement") if stage else None
        agreement = agreement if isinstance(agreement, dict) else {}
        cells = [
            text_cell(row.name),
            text_cell(row.stage),
            *measured_cells(row, run.source),
            number_cell(agreement.get("kl_divergence"), plain),
            number_cell(agreement.get("same_next_token"), percent),
            number_cell(row.seconds, duration),
            number_cell(row.peak_rss_bytes, size),
        ]
        rows.append(cells)
    return without_empty_columns(Table("stages", STAGE_COLUMNS, rows))


def measured_cells(row: Row, source: Row | None) -> list[Cell]:
    """The sizes of a checkpoint and what was measured of it, from `parameters` to `accuracy_delta`."""
    against = source if source is not row else None
    before = against.perplexity if against else None
    change_of_perplexity = None if row.perplexity is None or before is None else row.perplexity - before
    return [
        number_cell(row.parameters, human),
        number_cell(None if row.unique_parameters == row.parameters else row.unique_parameters, human),
        number_cell(row.bytes, size),
        number_cell(row.shape.kv_cache_bytes(KV_TOKENS), size),
        number_cell(row.perplexity, two_places),
        number_cell(change_of_perplexity, signed),
        accuracy_cell(row),
        delta_cell(row.mmlu or _accuracy_alone(row), (against.mmlu or _accuracy_alone(against)) if against else None),
    ]


def accuracy_cell(row: Row) -> Cell:
    """Accuracy with the standard error that lm-eval gives it."""
    stderr = row.mmlu.stderr if row.mmlu else None
    error = {} if stderr is None else {"stderr": stderr, "stderr_text": f"± {100 * stderr:.1f}"}
    return number_cell(row.accuracy, percent, **error)


def _accuracy_alone(row: Row) -> Scores | None:
    return None if row.accuracy is None else Scores(accuracy=row.accuracy)


def delta_cell(scores: Scores | None, source: Scores | None) -> Cell:
    """A change of accuracy against the source, in points."""
    if scores is None or source is None:
        return Cell()
    delta, stderr = change(scores, source)
    error = {} if stderr is None else {"stderr": stderr, "stderr_text": f"± {100 * stderr:.1f}"}
    return number_cell(delta, points, tint=max(-1.0, min(1.0, 2 * delta)), **error)


def score_tables(run: Run) -> list[Table]:
    """Accuracy by subject and by category against the source; those that the last checkpoint lost most on come first.

    None where fewer than two checkpoints were asked, or the source was not.
    """
    source = run.source.mmlu if run.source else None
    asked = [row for row in checkpoints(run) if row.mmlu and row.mmlu is not source]
    if source is None or not asked:
        return []
    found = []
    for name, part in (("categories", "category"), ("subjects", "subject")):
        by_checkpoint = [getattr(row.mmlu, name) for row in asked]
        rows = _score_rows(getattr(source, name), by_checkpoint)
        columns = [
            Column(part, part, numeric=False),
            Column("questions", "questions"),
            Column("source", "source"),
            *(Column(row.name, row.name, "Points against the source.") for row in asked),
        ]
        found += [without_empty_columns(Table(name, columns, rows))] if len(rows) > 1 else []
    return found


def _score_rows(source: dict[str, Scores], by_checkpoint: list[dict[str, Scores]]) -> list[list[Cell]]:
    rows = [
        [
            text_cell(name.replace("_", " ")),
            number_cell(scores.questions, str),
            number_cell(scores.accuracy, percent),
            *(delta_cell(checkpoint.get(name), scores) for checkpoint in by_checkpoint),
        ]
        for name, scores in source.items()
    ]
    return sorted(rows, key=lambda row: (row[-1].value is None, row[-1].value))


def other_results(run: Run) -> Table | None:
    """The numbers of all other tasks, a column each; None where there are none."""
    values = {row.name: dict(_numbers(row)) for row in run.rows}
    names = list(dict.fromkeys(name for found in values.values() for name in found))
    if not names:
        return None
    columns = [Column("stage", "stage", numeric=False), *(Column(name, name) for name in names)]
    rows = [
        [text_cell(name), *(number_cell(found.get(measure), plain) for measure in names)]
        for name, found in values.items()
        if found
    ]
    return Table("other-tasks", columns, rows)


def _numbers(row: Row) -> Iterable[tuple[str, Any]]:
    for task, result in row.evaluations.items():
        if task not in OURS:
            yield from ((f"{task} {name}", value) for name, value in result.items() if isinstance(value, int | float))
