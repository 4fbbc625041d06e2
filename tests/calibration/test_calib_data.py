"""The texts in `calib_data`: made as they say, in the layout that lm-eval asks in, and enough for the recipes."""

import json
import re
from collections import Counter
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

from autoglm_compress.calibration.text import documents, locate
from autoglm_compress.recipe import load_recipe
from support.places import ROOT

DATA = ROOT / "calib_data"
OPENING = re.compile(r"The following are multiple choice questions \(with answers\) about ([^\n]+)\.\n\n")
SOLVED = re.compile(r"([^\n]+)\nA\. ([^\n]+)\nB\. ([^\n]+)\nC\. ([^\n]+)\nD\. ([^\n]+)\nAnswer: ([ABCD])\n\n")
BYTES_PER_TOKEN = 4
IMAGE_TOKENS = 312
"""Of a drawn screen, for GLM-4.1V."""


def solved(file: Path) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Of every prompt in a file its subject and its questions: question, four options, letter."""
    prompts = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        opening = OPENING.match(text)
        assert opening, text
        questions = SOLVED.findall(text)
        assert opening[0] + "".join(match[0] for match in SOLVED.finditer(text)) == text
        prompts.append((opening[1], questions))
    return prompts


@pytest.mark.parametrize(("name", "length"), [("multiple_choice", 5), ("quiz_prompts", 8)])
def test_prompts_are_in_the_layout_of_mmlu(name: str, length: int):
    for _, questions in solved(DATA / f"{name}.jsonl"):
        assert len(questions) == length
        assert all(len(set(options)) == 4 for _, *options, _ in questions)


def test_multiple_choice_is_varied_and_balanced():
    prompts = solved(DATA / "multiple_choice.jsonl")
    questions = list(chain.from_iterable(questions for _, questions in prompts))
    assert len({subject for subject, _ in prompts}) == len(prompts) >= 40
    assert len({question for question, *_ in questions}) == len(questions) >= 240
    letters = Counter(letter for *_, letter in questions)
    assert max(letters.values()) - min(letters.values()) <= 1
    chinese = sum(not question.isascii() and "？" in question for question, *_ in questions)
    assert 0.3 < chinese / len(questions) < 0.37


def test_quiz_prompts_are_made_of_the_development_questions_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "reference_model")
    script, data = import_module("quiz_prompts"), import_module("training_data")
    made = "".join(json.dumps({"text": text}) + "\n" for text in script.prompts(DATA / "quiz"))
    assert made == (DATA / "quiz_prompts.jsonl").read_text(encoding="utf-8")
    quiz = data.read_quiz(DATA / "quiz")
    answers = {(row.question, row.answer) for subject in quiz for row in subject.dev}
    asked = set()
    for _, questions in solved(DATA / "quiz_prompts.jsonl"):
        asked |= {(question, options["ABCD".index(letter)]) for question, *options, letter in questions}
    assert asked == answers
    assert not any(row.question in made for subject in quiz for row in subject.test)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_texts_are_enough_for_the_shipped_recipes(file: Path):
    recipe = load_recipe(file)
    for source, rows in recipe.calibration.rows.items():
        texts = documents(locate(source, recipe.bases, "calibration.source"), "calibration")
        size = sum(len(str(text if isinstance(text, str) else text.messages).encode()) for text in texts)
        images = sum(len(text.files) for text in texts if not isinstance(text, str))
        tokens = size / BYTES_PER_TOKEN + images * IMAGE_TOKENS
        assert tokens >= rows * recipe.calibration.sequence_length, source
