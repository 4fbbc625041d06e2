"""The embedded model that sees and hears: plain transformers runs it, and a compressed one still answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reference_model.omni.evaluate import Row, accuracy, answers, read_rows
from support.multimodal import load
from support.places import ROOT
from support.running import run as run_recipe
from support.running import stage_folders, write_recipe

OMNI = ROOT / "reference_model" / "omni"
CHECKPOINT, DATA = OMNI / "checkpoint", OMNI / "data"
EACH = 12
"""Questions of each kind."""
STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "num_hidden_layers": 9},
    {"stage": "quantize", "bits": 4, "group_size": 32},
]

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def questions() -> list[Row]:
    every = [row for name in ("test", "test-text") for row in read_rows(DATA / f"{name}.jsonl")]
    return [row for kind in ("image", "audio", "both", "text") for row in [r for r in every if r.kind == kind][:EACH]]


def test_it_loads_in_plain_transformers_and_is_small():
    model = load(CHECKPOINT)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8_000_000
    assert model.config.text_config.num_hidden_layers == 10


def test_it_answers_what_it_sees_and_hears(questions: list[Row]):
    assert all(share >= 11 / 12 for share in accuracy(CHECKPOINT, questions).values())


def test_without_the_picture_or_the_sound_it_cannot_answer(questions: list[Row]):
    """Every question of a kind about the first one's files: the wordings alone say nothing."""
    asked = [row for row in questions if row.kind == "both"]
    files = [part for part in asked[0].question[0]["content"] if part["type"] != "text"]
    other = [
        Row([turn | {"content": [*files, turn["content"][-1]]} for turn in row.question], row.answer, row.kind)
        for row in asked
    ]
    given = answers(CHECKPOINT, other)
    assert set(given) == {asked[0].answer}


def test_a_short_chain_on_it_keeps_it_answering(questions: list[Row], tmp_path: Path):
    calibration = {"source": str(DATA / "calibration.jsonl"), "samples": 24, "sequence_length": 80}
    run_recipe(write_recipe(tmp_path, CHECKPOINT, STAGES, calibration=calibration))
    depth, quantized = stage_folders(tmp_path / "out")
    assert all(share >= 9 / 12 for share in accuracy(depth, questions).values())
    assert all(share >= 9 / 12 for share in accuracy(quantized, questions).values())
