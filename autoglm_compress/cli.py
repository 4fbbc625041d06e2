"""The command line: parse, call, print."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autoglm_compress.errors import UserError

app = typer.Typer(
    help="Turn a large language model into one that fits a phone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Device(str, Enum):
    """Where layers run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/demo.yaml.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as stages.ffn.method=random."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where results go. \\[default: runs/NAME-OF-RECIPE]")
]


@contextmanager
def _one_message() -> Iterator[None]:
    """Show what the user can put right as one message, with exit code 2."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _quiet_transformers() -> None:
    """Its bars and advice would stand between ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"autoglm-compress {version('autoglm-compress')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a large language model into one that fits a phone."""


@app.command()
def run(
    recipe: RecipeFile,
    output: Output = None,
    assignments: Assignments = None,
    device: Annotated[Device, typer.Option(help="Where layers run.")] = Device.auto,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and those after it again.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what earlier runs of the recipe made first.")] = False,
) -> None:
    """Run a recipe, stage by stage.

    Every stage leaves a checkpoint that plain transformers loads.
    Finished stages are skipped, an interrupted one goes on where it was.
    """
    with _one_message():
        from autoglm_compress.pipeline import RunOptions, run_recipe
        from autoglm_compress.progress import Progress
        from autoglm_compress.recipe import load_recipe

        _quiet_transformers()
        loaded = load_recipe(recipe, assignments or ())
        options = RunOptions(output or Path("runs") / loaded.name, device.value, first, last, fresh)
        folder = run_recipe(loaded, options, Progress(Console()))
        typer.echo(f"results: {folder}")


@app.command()
def plan(
    recipe: RecipeFile,
    output: Output = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show what a recipe will do, reading no weights.

    Sizes after every stage, the memory it needs, disk, and warnings.
    """
    with _one_message():
        from autoglm_compress.pipeline import plan_recipe
        from autoglm_compress.pipeline.metrics import human, plan_table
        from autoglm_compress.recipe import load_recipe

        _quiet_transformers()
        loaded = load_recipe(recipe, assignments or ())
        planned = plan_recipe(loaded, output or Path("runs") / loaded.name)
        if as_json:
            typer.echo(json.dumps(planned.as_data(), indent=2))
            return
        console = Console()
        console.print(plan_table(planned))
        typer.echo("\nKV/1k: 16-bit cache of 1000 tokens. RAM: estimated peak.")
        typer.echo(f"disk: {human(planned.disk_bytes)}B needed, {human(planned.free_bytes)}B free")
        for warning in planned.warnings():
            typer.echo(f"warning: {warning}")


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with config and safetensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint is: family, shape, parameters by part, dtypes, quantization."""
    with _one_message():
        from autoglm_compress.inspection import inspect_checkpoint, print_inspection

        _quiet_transformers()
        found = inspect_checkpoint(checkpoint)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            print_inspection(found, Console())


if __name__ == "__main__":
    app()
