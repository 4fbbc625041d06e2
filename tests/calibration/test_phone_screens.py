"""The drawn screens in `calib_data`: made as they say, readable for a model that sees, with actions that are right."""

import json
import random
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.text import documents
from autoglm_compress.checkpoint import Checkpoint
from support.media import save_with_processor
from support.places import ROOT

DATA = ROOT / "calib_data"
ROWS, MOST_BYTES, MOST_OF_ALL = 240, 8_192, 1_500_000
ANSWER = re.compile(r"<think>(.+)</think><answer>(.+)</answer>")
ACTION = re.compile(
    r'do\(action="Tap", element=\[(\d{1,3}),(\d{1,3})\]\)'
    r'|do\(action="Type", text="[^"]+"\)'
    r'|do\(action="Swipe", start=\[500,750\], end=\[500,250\]\)'
    r'|do\(action="Back"\)'
    r'|finish\(message="[^"]+"\)'
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "screens")
        return import_module("draw_screens")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "phone_screens.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), dtype=float)


def test_the_script_makes_the_shipped_rows_and_the_same_bytes_each_time(script: ModuleType, tmp_path: Path):
    """FreeType may smooth letters otherwise in another version: images are compared by what one sees."""
    for name in ("one", "two"):
        script.write(tmp_path / name, 16, 0)
    one, two = (sorted(file for file in (tmp_path / name).rglob("*") if file.is_file()) for name in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    shipped = (DATA / "phone_screens.jsonl").read_text(encoding="utf-8")
    assert shipped.startswith((tmp_path / "one" / "phone_screens.jsonl").read_text(encoding="utf-8"))
    for number in range(16):
        image = f"phone_screens/{number:03d}.png"
        assert np.abs(pixels(tmp_path / "one" / image) - pixels(DATA / image)).mean() < 3


def test_the_set_is_small_balanced_and_in_the_format_of_the_agent(rows: list[dict[str, Any]]):
    images = sorted((DATA / "phone_screens").iterdir())
    assert len(images) == len(rows) == ROWS
    assert max(file.stat().st_size for file in images) <= MOST_BYTES
    assert sum(file.stat().st_size for file in images) <= MOST_OF_ALL
    kinds: Counter[str] = Counter()
    for number, row in enumerate(rows):
        system, asked, answered = row["messages"]
        picture, task = asked["content"]
        assert (system["role"], picture["path"]) == ("system", f"phone_screens/{number:03d}.png")
        found = ANSWER.fullmatch(answered["content"])
        assert found, answered
        assert ACTION.fullmatch(found[2]), found[2]
        kinds[found[2].partition("(")[2].split('"')[1] if found[2].startswith("do") else "finish"] += 1
        assert any("一" <= letter <= "鿿" for letter in task["text"]) == bool(number % 2)
    assert {"Tap", "Type", "Swipe", "Back", "finish"} == set(kinds)
    assert min(kinds.values()) >= 5
    assert len({row["messages"][1]["content"][1]["text"] for row in rows}) > ROWS // 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), kind=st.integers(0, 7), language=st.integers(0, 1))
def test_a_tap_lies_within_what_is_drawn_for_it_and_in_nothing_else(
    script: ModuleType, seed: int, kind: int, language: int
):
    drawn = script.one(seed, kind, language)
    canvas, found = drawn.canvas, ACTION.fullmatch(drawn.action)
    assert found, drawn.action
    width, height = canvas.image.size
    for left, top, right, bottom in canvas.elements.values():
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    if drawn.target is None:
        assert found[1] is None
        return
    x, y = int(found[1]) * width // 1000, int(found[2]) * height // 1000  # as the agent turns them into pixels
    hit = [name for name, box in canvas.elements.items() if box[0] <= x < box[2] and box[1] <= y < box[3]]
    assert hit == [drawn.target]
    colors = canvas.image.crop(canvas.elements[drawn.target]).getcolors(maxcolors=100_000)
    assert len(colors) > 3


def test_every_character_has_a_glyph(script: ModuleType):
    canvas = import_module("screen_canvas")
    missing = canvas.font(20).getmask("\U0001f9ff").getbbox()
    for line in (ROOT / "screens" / "words.yaml").read_text(encoding="utf-8").splitlines():
        for letter in set(line) - {" ", "#"}:
            assert canvas.font(20).getmask(letter).getbbox() != missing or letter.isascii(), letter


def test_a_model_that_sees_reads_every_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    folder = save_with_processor("glm4v", tmp_path, tokenizer)
    chats = MediaChats(folder, Checkpoint(folder).family)
    found = documents(DATA / "phone_screens.jsonl", "calibration") + documents(DATA / "phone_screens.jsonl", "held-out")
    assert len(found) == ROWS
    for chat in random.Random(0).sample(found, 24):
        assert chat.media == ("image",)
        assert max(chats.ids(chat)) >= chats.vocab_size
