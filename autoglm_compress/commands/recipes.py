"""Commands on recipes: `run`, `plan`, `recipes`, and `report` on what a run left."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autoglm_compress.commands.behaviour import one_message, quiet_transformers
from autoglm_compress.commands.options import Device, MemoryLimit
from autoglm_compress.errors import UserError
from autoglm_compress.shipped import bundled_recipe, bundled_recipes, hides_file, summary

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name that `recipes` lists, or a file, such as my.yaml.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as stages.ffn.method=random."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where results go. \\[default: runs/NAME-OF-RECIPE]")
]


def run(
    recipe: RecipeName,
    output: Output = None,
    assignments: Assignments = None,
    device: Annotated[Device, typer.Option(help="Where layers run.")] = Device.auto,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and those after it again.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what earlier runs of the recipe made first.")] = False,
    memory_limit: MemoryLimit = None,
) -> None:
    """Run a recipe, stage by stage.

    Every stage leaves a checkpoint that plain transformers loads.
    Finished stages are skipped. An interrupted stage continues where it stopped.
    """
    with one_message("stopped: what is finished is kept, and the same command goes on at the layer it had reached"):
        from autoglm_compress.api import running

        loaded = _load(recipe, assignments)
        running.run(
            loaded,
            output,
            device=device.value,
            first=first,
            last=last,
            fresh=fresh,
            memory_limit=memory_limit,
            progress=True,
        )


def plan(
    recipe: RecipeName,
    output: Output = None,
    assignments: Assignments = None,
    memory_limit: MemoryLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show what a recipe will do, reading no weights.

    Sizes after every stage, the memory it needs, disk, and warnings.
    """
    with one_message():
        from autoglm_compress.api import running
        from autoglm_compress.pipeline.metrics import human, parts_lines, plan_table

        loaded = _load(recipe, assignments)
        planned = running.plan(loaded, output, memory_limit=memory_limit)
        if as_json:
            typer.echo(json.dumps(planned.as_data(), indent=2))
            return
        Console().print(plan_table(planned))
        typer.echo("\nKV/1k: 16-bit cache of 1000 tokens. RAM: estimated peak.")
        for line in parts_lines(planned):
            typer.echo(line)
        kept = "" if loaded.keep == "all" else f" at most, {human(planned.disk_bytes_kept)}B for what is kept"
        needed, free = human(planned.disk_bytes_needed), human(planned.disk_bytes_free)
        typer.echo(f"disk: {needed}B needed{kept}, {free}B free")
        for warning in planned.warnings:
            typer.echo(f"warning: {warning}")


def _load(recipe: str, assignments: list[str] | None) -> Any:
    """The recipe of a name or file, changed by `--set`."""
    from autoglm_compress.recipe import load_recipe

    quiet_transformers()
    if hides_file(recipe):
        typer.echo(f"note: {recipe} is the package's recipe; the file of this name is ./{recipe}", err=True)
    return load_recipe(recipe, assignments or ())


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this recipe. \\[default: list all]")] = None,
    copy: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy it, with the files that it names, for you to change.")
    ] = None,
) -> None:
    """List the recipes that come with the package, show one, or copy one."""
    with one_message():
        if name is None:
            if copy is not None:
                raise UserError("--copy: name the recipe to copy, such as: autoglm-compress recipes demo --copy DIR.")
            known = bundled_recipes()
            for label, file in known.items():
                typer.echo(f"{label:{max(map(len, known))}}  {summary(file)}")
        elif copy is None:
            typer.echo(bundled_recipe(name).read_text(encoding="utf-8"), nl=False)
        else:
            from autoglm_compress.recipe.copying import copy_recipe  # takes seconds

            file, others = copy_recipe(name, copy)
            typer.echo(f"{len(others)} files in {copy}; go on with: autoglm-compress plan {file}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A folder that `run` wrote, or several.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where the page goes. \\[default: report.html or comparison.html in the (first) RUN]"
        ),
    ] = None,
) -> None:
    """Write a run as one HTML page with tables and figures, or compare several.

    The page needs no network: it can be sent, kept and printed.
    """
    with one_message():
        from autoglm_compress.report.comparison_page import COMPARISON, write_comparison_page
        from autoglm_compress.report.page import REPORT, write_run_page

        if len(runs) == 1:
            from autoglm_compress.stages.drawing import draw  # takes seconds, and a comparison does without

            output = output or runs[0] / REPORT
            write_run_page(runs[0], draw, output)
        else:
            output = output or runs[0] / COMPARISON
            write_comparison_page(runs, output)
        typer.echo(f"report: {output}")
