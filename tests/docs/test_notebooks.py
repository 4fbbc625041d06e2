"""The example notebooks: their cells run one after the other, and print what is stored below them, but for numbers."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.places import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))
NUMBER = re.compile(r" *[-+]?\d[\d,.]*")


def _form(text: str) -> str:
    """What was printed, without its numbers: they depend on Python's version, whose documentation is the text."""
    return NUMBER.sub(" N", text)


def _stored(cell: dict[str, Any]) -> str:
    return "".join(line for output in cell["outputs"] for line in output["text"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.name)
def test_cells_run_and_print_what_is_stored(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
        assert _form(printed.getvalue()) == _form(_stored(cell)), f"cell {number}"
