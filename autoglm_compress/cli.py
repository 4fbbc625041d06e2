"""The command line: all commands, and what they have in common."""

from typing import Annotated

import typer

from autoglm_compress import __version__
from autoglm_compress.commands import checkpoints, recipes, serving
from autoglm_compress.memory import keep_freed_memory
from autoglm_compress.threads import sleep_soon

app = typer.Typer(
    help="Turn a large language model into one that fits a phone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"autoglm-compress {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a large language model into one that fits a phone."""
    keep_freed_memory()
    sleep_soon()


for command in (
    recipes.run,
    recipes.plan,
    recipes.recipes,
    checkpoints.inspect,
    checkpoints.evaluate,
    checkpoints.export,
    checkpoints.push,
    checkpoints.compare,
    serving.serve,
    serving.verify,
    serving.chat,
    serving.benchmark,
    recipes.report,
):
    app.command()(command)
