"""A few generated answers of the source and of what was made of it, side by side."""

from autoglm_compress.records.files import SOURCE
from autoglm_compress.records.task_results import RECORDS, Answer, TaskRecords
from autoglm_compress.report.chain import checkpoints
from autoglm_compress.report.run_record import Run
from autoglm_compress.report.tables import Cell, Column, Table, text_cell

FEW = 12
SHOWN = 200
"""Characters of a text in a cell."""


def answers_table(run: Run) -> Table | None:
    """Rows of the task `generate`: those that some checkpoints got right and others wrong first, FEW in all.

    None if no checkpoint was asked. Checkpoints that were asked other rows than the first one are left out.
    """
    asked = {row.name: found for row in checkpoints(run) if (found := _answers(run, row.name))}
    if not asked:
        return None
    first = next(iter(asked.values()))
    asked = {name: found for name, found in asked.items() if _questions(found) == _questions(first)}
    by_row = list(zip(*asked.values(), strict=True))
    by_row.sort(key=lambda answers: len({answer.right for answer in answers}) == 1)
    columns = [
        Column("question", "question", numeric=False),
        Column("expected", "right answer", numeric=False),
        *(Column(name, "source" if name == SOURCE else name, numeric=False) for name in asked),
    ]
    rows = [[_cell(row[0].question), _cell(row[0].expected), *map(_answer_cell, row)] for row in by_row[:FEW]]
    return Table("answers", columns, rows)


def _answers(run: Run, name: str) -> list[Answer]:
    entry = run.evaluations[name].tasks.get("generate") if name in run.evaluations else None
    return [] if entry is None else TaskRecords.model_validate(entry.result.get(RECORDS, {})).answers


def _questions(answers: list[Answer]) -> list[tuple[str, str]]:
    return [(answer.question, answer.expected) for answer in answers]


def _answer_cell(answer: Answer) -> Cell:
    return _cell(f"{'✓' if answer.right else '✗'} {answer.answer}")


def _cell(text: str) -> Cell:
    return text_cell(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
