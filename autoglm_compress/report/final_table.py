"""The result of a run: its final checkpoints against the source."""

from dataclasses import dataclass

from autoglm_compress.records.metrics import Row
from autoglm_compress.report.chain import final_checkpoints
from autoglm_compress.report.numbers import human, percent, plain, points, size, two_places
from autoglm_compress.report.run_record import Run
from autoglm_compress.report.run_tables import STAGE_COLUMNS, measured_cells
from autoglm_compress.report.tables import Column, Table, number_cell, text_cell, without_empty_columns


@dataclass(frozen=True)
class Tile:
    """One measure: the source's value, the checkpoint's, and the change."""

    heading: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Verdict:
    """A final checkpoint in a few numbers."""

    name: str
    tiles: list[Tile]


def verdict(row: Row, source: Row | None) -> Verdict:
    """The measures of a final checkpoint, against the source's where these exist."""
    tiles = []
    for heading, field, show in (("parameters", "parameters", human), ("size", "bytes", size)):
        before, after = getattr(source, field, None), getattr(row, field)
        if after is not None:
            change = f"{points(after / before - 1)} %" if before else ""
            tiles.append(Tile(heading, show(before) if before else "", show(after), change))
    before = source.perplexity if source else None
    if row.perplexity is not None:
        change = f"{plain(row.perplexity / before)} × the source's" if before else ""
        tiles.append(Tile("perplexity", two_places(before) if before else "", two_places(row.perplexity), change))
    if row.accuracy is not None:
        before = source.accuracy if source else None
        delta = measured_cells(row, source)[-1]
        change = f"{delta.text} points {delta.stderr_text}".strip() if delta.text else ""
        tiles.append(Tile("accuracy", "" if before is None else percent(before), percent(row.accuracy), change))
    return Verdict(row.name, tiles)


def final_table(runs: dict[str, Run]) -> Table:
    """The source and the final checkpoints of each run, by its name where there are several."""
    measured = STAGE_COLUMNS[2:10]
    columns = [
        Column("run", "run", numeric=False),
        Column("checkpoint", "checkpoint", numeric=False),
        *measured[:5],
        Column("perplexity_ratio", "× source", "Perplexity over the source's."),
        *measured[5:],
    ]
    rows = []
    for name, run in runs.items():
        base = run.source.perplexity if run.source else None
        for row in [*([run.source] if run.source else []), *final_checkpoints(run)]:
            cells = measured_cells(row, run.source)
            ratio = row.perplexity / base if base and row.perplexity is not None else None
            rows.append([text_cell(name), text_cell(row.name), *cells[:5], number_cell(ratio, plain), *cells[5:]])
    table = without_empty_columns(Table("finals", columns, rows))
    return table if len(runs) > 1 else Table(table.name, table.columns[1:], [row[1:] for row in table.rows])
