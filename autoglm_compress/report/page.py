"""The page of one run: `report.html`, which needs nothing but itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from autoglm_compress.figures import Record, as_svg
from autoglm_compress.progress import Progress
from autoglm_compress.records.metrics import Row
from autoglm_compress.records.stage import StageRecord
from autoglm_compress.report.answers import answers_table
from autoglm_compress.report.chain import boxes, checkpoints, final_checkpoints
from autoglm_compress.report.final_table import final_table, verdict
from autoglm_compress.report.inline_svg import inline_svg
from autoglm_compress.report.layer_errors import heat_map, layer_table
from autoglm_compress.report.render import render, write_page
from autoglm_compress.report.run_plots import ACCURACY, PERPLEXITY, Measure, cost_plot, size_curve
from autoglm_compress.report.run_record import Run, read_run
from autoglm_compress.report.run_tables import other_results, score_tables, stage_table
from autoglm_compress.report.tables import Table, json_link

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Record], bytes | None]
"""Gives an SVG of a stage's decisions from the content of its `stage.json`, or None."""
REPORT = "report.html"
MEASURES = (PERPLEXITY, ACCURACY)
FEW = 3
"""Up to this many final checkpoints are described one by one; more become a table."""


@dataclass(frozen=True)
class Picture:
    """A figure, or why there is none."""

    svg: Markup | None = None
    note: str = ""


@dataclass(frozen=True)
class StageSection:
    """The page's section on one stage."""

    row: Row
    warnings: list[str]
    options: list[tuple[str, str]]
    pictures: list[Picture]
    table: Table | None
    decisions_link: str | None
    notes: list[str] = field(default_factory=list)


def run_page(run: Run, draw: Draw) -> str:
    """The whole page of a run, as HTML; `draw` gives the picture of each stage."""
    finals = final_checkpoints(run)
    drawn = boxes(run)
    curves = [picture_of(f"curve-{measure.field}", measure.heading, _curve(run, measure)) for measure in MEASURES]
    return render(
        "run.html.jinja",
        title=run.recipe,
        facts=_facts(run),
        versions=sorted(run.manifest.versions.items()),
        verdicts=[verdict(row, run.source) for row in finals] if len(finals) <= FEW else [],
        finals=final_table({run.recipe: run}) if len(finals) > FEW else None,
        boxes=drawn,
        lanes=1 + max(max([box.lane, *box.above, *box.below]) for box in drawn),
        curves=[curve for curve in curves if curve.svg or curve.note],
        stages=stage_table(run),
        scores=score_tables(run),
        others=other_results(run),
        answers=answers_table(run),
        costs=picture_of("cost-bars", "time and peak memory of each stage", lambda: cost_plot(run)),
        sections=_sections(run, draw),
    )


def _curve(run: Run, measure: Measure) -> "Callable[[], Figure | None]":
    return lambda: size_curve({run.recipe: run}, measure)


def write_run_page(folder: Path, draw: Draw, output: Path) -> None:
    """Read the folder of a run and write its page.

    Raises:
        UserError: the folder is not that of a run, or a file in it is damaged.
    """
    write_page(run_page(read_run(folder), draw), output)


def write_report(folder: Path, draw: Draw, progress: Progress) -> None:
    """Write the page of a run that is done into its folder; say why if that fails."""
    try:
        write_run_page(folder, draw, folder / REPORT)
    except Exception as error:  # an error in the page does not fail the run
        progress.note(f"warning: no {REPORT}: {type(error).__name__}: {error}")


def picture_of(name: str, label: str, make: "Callable[[], Figure | None]") -> Picture:
    """A figure that a function draws, as a part of the page; `name` keeps its ids apart from those of others."""
    return _picture(name, label, lambda: as_svg(make))


def _picture(name: str, label: str, make: Callable[[], bytes | None]) -> Picture:
    try:
        svg = make()
    except Exception as error:  # a record of another version, or a damaged one: the rest of the page is still shown
        return Picture(note=f"No picture of {label}: {type(error).__name__}: {error}")
    return Picture(Markup(inline_svg(svg, name, label)) if svg else None)


def _facts(run: Run) -> list[tuple[str, str]]:
    """The facts at the top of the page, as far as they are known."""
    manifest = run.manifest
    threads = "" if manifest.threads is None else f", {manifest.threads} thread{'s' * (manifest.threads != 1)}"
    known = {
        "source": manifest.source.folder,
        "finished": manifest.written,
        "device": manifest.device and manifest.device + threads,
        "seed": manifest.seed,
    }
    return [(name, str(value)) for name, value in known.items() if value is not None]


def _sections(run: Run, draw: Draw) -> list[StageSection]:
    """The sections of stages with decisions to show. Evaluations are in the tables already."""
    made = {row.name for row in checkpoints(run)}
    found = [_section(row, run.stages[row.name], draw) for row in run.rows if row.name in run.stages]
    return [one for one in found if one.row.name in made or one.pictures or one.table or one.warnings]


def _section(row: Row, stage: StageRecord, draw: Draw) -> StageSection:
    notes, table = [], None
    try:
        table = layer_table(f"{row.name}-layers", stage.linears) if stage.linears else None
    except Exception as error:  # as for a picture
        notes.append(f"No errors by layer: {type(error).__name__}: {error}")
    pictures = [
        _picture(f"plot-{row.name}", f"what {row.name} decided", lambda: draw(stage.as_data())),
        picture_of(f"heat-{row.name}", f"errors by layer of {row.name}", lambda: heat_map(stage.linears)),
    ]
    options = {name: value for name, value in stage.options.items() if name != "stage" and value is not None}
    return StageSection(
        row=row,
        warnings=stage.warnings,
        options=[(name, _spelled(value)) for name, value in options.items()],
        pictures=[picture for picture in pictures if picture.svg or picture.note],
        table=table,
        decisions_link=json_link(stage.decisions) if stage.decisions else None,
        notes=notes,
    )


def _spelled(value: Any) -> str:
    """An option as in a recipe. Unset fields are left out."""
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
