"""The recipe that is run again, killed and changed in tests, and what an undisturbed run of it leaves."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from support.running import digests, run, write_recipe

STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "num_hidden_layers": 3},
    {"stage": "heads", "num_attention_heads": 6},
    {"stage": "ffn", "intermediate_size": 96},
    {"stage": "width", "hidden_size": 32},
    {"stage": "tie"},
    {"stage": "refit"},
    {"stage": "evaluate", "tasks": ["perplexity"]},
    {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32},
    {"stage": "quantize", "name": "int4", "from": "refit", "bits": 4, "group_size": 32},
]
CHECKPOINTS = ["01-depth", "02-heads", "03-ffn", "04-width", "05-tie", "06-refit", "08-int8", "09-int4"]
NAMES = sorted([*CHECKPOINTS, "07-evaluate"])


@pytest.fixture(scope="session")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of its own: to read the interpreter's takes every process seconds."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    return write_text(file, "This is about the number {}.")


def write_text(file: Path, sentence: str) -> Path:
    """Calibration text: a row for every number that a sentence has a place for."""
    file.write_text("\n".join(json.dumps({"text": sentence.format(number)}) for number in range(300)))
    return file


Write = Callable[..., Path]


@pytest.fixture(scope="session")
def write(source: Path, text: Path) -> Write:
    """Write the recipe into a folder, with changed options of stages by their names, or with other top-level keys."""

    def write(folder: Path, changes: dict[str, dict[str, Any]] | None = None, **top: Any) -> Path:
        stages = [stage | (changes or {}).get(stage.get("name", stage["stage"]), {}) for stage in STAGES]
        calibration = {"source": str(text), "samples": 4, "sequence_length": 32}
        return write_recipe(folder, source, **({"stages": stages, "calibration": calibration} | top))

    return write


@pytest.fixture(scope="session")
def quiet_run(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run that nothing disturbed, with its output beside it."""
    recipe = write(tmp_path_factory.mktemp("undisturbed"))
    run(recipe)
    return recipe


@pytest.fixture(scope="session")
def undisturbed(quiet_run: Path) -> dict[str, str]:
    """The hashes of what a run that nothing disturbs leaves."""
    return digests(quiet_run.parent / "out")


@pytest.fixture
def finished(quiet_run: Path, write: Write, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    copytree(quiet_run.parent / "out", tmp_path / "out")
    return write(tmp_path)


def said(output: str, what: str) -> list[str]:
    """The stages of which a run said something."""
    return re.findall(rf"(\d\d-\S+): {what}", output)
