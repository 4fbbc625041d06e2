"""The page that compares several runs: their results, and the differences of their recipes."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autoglm_compress.report.final_table import final_table
from autoglm_compress.report.page import MEASURES, picture_of
from autoglm_compress.report.render import render, write_page
from autoglm_compress.report.run_plots import size_curve
from autoglm_compress.report.run_record import Run, read_run
from autoglm_compress.report.tables import Cell, Column, Table, text_cell

COMPARISON = "comparison.html"
MEASURED_BY = ("evaluation.perplexity.", "evaluation.mmlu.", "calibration.source", "seed")
"""Fields that evaluations depend on. Results of runs that differ in them cannot be compared."""


def write_comparison_page(folders: Sequence[Path], output: Path) -> None:
    """Read the folders of several runs and write the page that compares them.

    Raises:
        UserError: a folder is not that of a run, or a file in it is damaged.
    """
    write_page(comparison_page([read_run(folder) for folder in folders]), output)


def comparison_page(runs: Sequence[Run]) -> str:
    """The whole page, as HTML."""
    named = _named(runs)
    differences = _differences(named)
    curves = [
        picture_of(f"curve-{measure.field}", measure.heading, partial(size_curve, named, measure))
        for measure in MEASURES
    ]
    return render(
        "comparison.html.jinja",
        title=", ".join(named),
        folders=[(name, str(run.folder)) for name, run in named.items()],
        finals=final_table(named),
        curves=[curve for curve in curves if curve.svg or curve.note],
        differences=differences,
        incomparable=[row[0].text for row in differences.rows if row[0].text.startswith(MEASURED_BY)],
    )


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by the names of their recipes, with the folder where several have one name."""
    count = Counter(run.recipe for run in runs)
    return {run.recipe if count[run.recipe] == 1 else f"{run.recipe} ({run.folder})": run for run in runs}


def _differences(runs: dict[str, Run]) -> Table:
    """The fields that not all recipes agree on, spelled as `--set` takes them."""
    stages = [_stages(run.manifest.recipe) for run in runs.values()]
    shared = set.intersection(*map(set, stages))
    recipes = {name: dict(_recipe_fields(run.manifest.recipe, shared)) for name, run in runs.items()}
    names = dict.fromkeys(field for fields in recipes.values() for field in fields if field != "name")
    rows = []
    for field in names:
        values = [fields.get(field) for fields in recipes.values()]
        if len(set(values)) > 1:
            rows.append([text_cell(field), *(Cell(value, value or "") for value in values)])
    columns = [Column(name, name, numeric=False) for name in ("field", *recipes)]
    return Table("recipes", columns, rows)


def _stages(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a recipe by their names."""
    stages = [stage for stage in recipe.get("stages") or [] if isinstance(stage, dict)]
    return {str(stage.get("name") or stage.get("stage")): stage for stage in stages}


def _recipe_fields(recipe: dict[str, Any], shared: set[str]) -> Iterator[tuple[str, str]]:
    """Every field that is set, with its path.

    The order of the stages is a field, and so is a stage as a whole that is not `shared` by all recipes.
    """
    stages = _stages(recipe)
    yield from _fields({name: value for name, value in recipe.items() if name != "stages"})
    yield "stages", " → ".join(stages)
    for label, stage in stages.items():
        if label in shared:
            yield from _fields(stage, f"stages.{label}")
        else:
            yield f"stages.{label}", ", ".join(f"{name}: {value}" for name, value in _fields(stage) if name != "name")


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field within a value that is set, with its path; a mixture of calibration sources is one."""
    if isinstance(value, dict) and path != "calibration.source":
        for name, inner in value.items():
            yield from _fields(inner, f"{path}.{name}".removeprefix("."))
    elif value is not None:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
