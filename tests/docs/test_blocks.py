"""The code blocks of the documentation: those marked `run` run, and every other command line is one that could."""

import shlex
from collections.abc import Iterator
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest
from click import Context
from typer.main import get_command

from autoglm_compress.cli import app
from support.markdown import Block, blocks
from support.places import ROOT
from support.running import invoke

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
READ = ("recipes", "calib_data", "reference_model", "baselines")
"""What of the repository the commands may read."""
COMMAND = "autoglm-compress"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has nothing but what commands of the documentation read, as the working directory."""
    for name in READ:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


def _page(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _examples(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that stands under it."""
    for example in block.text.removeprefix("$ ").split("\n$ "):
        command, _, output = example.partition("\n")
        yield command, output.replace("…", "...")


def _run_console(block: Block) -> None:
    for command, expected in _examples(block):
        name, *arguments = shlex.split(command)
        assert name == COMMAND, command
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        same = OutputChecker().check_output(expected, result.output, ELLIPSIS | NORMALIZE_WHITESPACE)
        assert same, f"{command}: expected\n{expected}\nfound\n{result.output}"


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=_page)
def test_marked_blocks_run(page: Path) -> None:
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if not block.runs:
            continue
        if block.language == "console":
            _run_console(block)
        else:
            assert block.language == "python", f"{page}:{block.line}: nothing runs {block.language}"
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {"__name__": "example"})


def _command_lines(page: Path) -> Iterator[str]:
    """The lines of all code blocks of a page that call the command."""
    for block in blocks(page):
        for line in block.text.splitlines():
            if line.removeprefix("$ ").startswith(f"{COMMAND} "):
                yield line.removeprefix("$ ")


COMMAND_LINES = [(_page(page), line) for page in PAGES for line in _command_lines(page)]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_commands_have_the_options_that_they_are_given(page: str, line: str) -> None:
    """Parsing fails on an unknown command or option, on a missing argument and on a value of the wrong kind."""
    name, *arguments = shlex.split(line, comments=True)
    group = get_command(app)
    with Context(group, info_name=name) as context:
        _, command, rest = group.resolve_command(context, arguments)
        command.make_context(arguments[0], rest, parent=context)
