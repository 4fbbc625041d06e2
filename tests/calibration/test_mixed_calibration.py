"""Calibration on several sources: how many rows each gives, in which order, and what a run makes of them."""

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.text import documents
from autoglm_compress.calibration.tokens import CalibrationOptions, interleaved, share_out, token_rows
from autoglm_compress.pipeline.keys import calibration_key
from autoglm_compress.recipe import load_recipe
from support.command_line import assert_says, plan, refusal
from support.places import QWEN
from support.running import invoke, run, same_tensors, stage_folders, write_recipe

DEPTH = {"stage": "depth", "num_hidden_layers": 2}
EVALUATION = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
MakeCheckpoint = Callable[..., Path]
torch.set_num_threads(1)


def write_text(file: Path, sentence: str, rows: int = 300) -> Path:
    file.write_text("".join(json.dumps({"text": sentence.format(row)}) + "\n" for row in range(rows)))
    return file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "cats": write_text(tmp_path / "cats.jsonl", "Cat number {} sleeps."),
        "dogs": write_text(tmp_path / "dogs.jsonl", "DOG NUMBER {} BARKS."),
    }


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> SimpleNamespace:
    """As much of a checkpoint as is asked about here."""
    return SimpleNamespace(
        tokenizer=lambda: tokenizer,
        folder=Path("model"),
        shape=SimpleNamespace(vocab_size=512),
        family=SimpleNamespace(kept={}),
    )


def rows_of(files: dict[str, Path], model: SimpleNamespace, **options: object) -> tuple[torch.Tensor, list[str]]:
    """The calibration rows of some options, and what the user is told."""
    notes: list[str] = []
    text = CalibrationText(CalibrationOptions(**options), files, model, SimpleNamespace(note=notes.append))
    return torch.cat(text.batches), notes


# How many rows of each


shares = st.floats(1e-6, 1e6) | st.integers(1, 10) | st.sampled_from([5e-324, 1.7e308])


@given(st.lists(shares, min_size=1, max_size=8), st.integers(0, 200))
def test_rows_are_shared_out_in_proportion_and_every_source_gets_one(parts: list[float], more: int):
    rows = len(parts) + more
    given_out = share_out({str(number): part for number, part in enumerate(parts)}, rows)
    assert sum(given_out.values()) == rows
    assert min(given_out.values()) >= 1
    exact = [rows * Fraction(part) / sum(map(Fraction, parts)) for part in parts]
    if min(exact) >= 1:
        assert all(abs(got - part) < 1 for got, part in zip(given_out.values(), exact, strict=True))


@pytest.mark.parametrize(
    ("parts", "rows", "expected"),
    [([3, 1], 128, [96, 32]), ([1, 1], 5, [3, 2]), ([2.5, 2.5, 5], 8, [2, 2, 4]), ([1, 1000], 4, [1, 3])],
)
def test_shares_in_round_numbers(parts: list[float], rows: int, expected: list[int]):
    assert list(share_out(dict(zip("abc", parts, strict=False)), rows).values()) == expected


# In which order


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4))
@settings(deadline=None)
def test_every_stretch_of_rows_and_every_eighth_row_hold_all_sources(counts: list[int]):
    parts = [torch.full((count, 1), number) for number, count in enumerate(counts)]
    rows = interleaved(parts).flatten()
    assert torch.equal(rows.sort().values, torch.cat(parts).flatten())
    total = len(rows)
    regular = [rows[start::8] for start in range(8)]
    stretches = [rows[start : start + 16] for start in range(0, total, 5)]
    for number, count in enumerate(counts):
        for some in regular + stretches:
            assert abs((some == number).sum() - len(some) * count / total) <= 3


def test_held_out_rows_of_three_to_one_are_three_to_one():
    rows = interleaved([torch.zeros(96, 1), torch.ones(32, 1)]).flatten()
    assert [3 <= rows[start::8].sum() <= 5 for start in range(8)] == [True] * 8  # of 16


@pytest.mark.parametrize("mapping", [False, True])
def test_one_source_gives_its_documents_in_a_row(files: dict[str, Path], model: SimpleNamespace, mapping: bool):
    source = {"cats": 0.5} if mapping else "cats"
    rows, notes = rows_of(files, model, source=source, samples=8, sequence_length=20, seed=3)
    order = documents(files["cats"], "fitted")
    random.Random(3).shuffle(order)
    tokenizer = model.tokenizer()
    stream = [token for text in order for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert rows.tolist() == [stream[start : start + 20] for start in range(0, 160, 20)]
    assert notes == []


def test_a_row_never_mixes_sources_and_the_rows_are_those_of_each_alone(files: dict[str, Path], model: SimpleNamespace):
    rows, notes = rows_of(files, model, source={"cats": 3, "dogs": 1}, samples=16, sequence_length=20)
    alone = [
        token_rows(Reader(model.tokenizer()), files[source], "fitted", count, 20, seed=0)
        for source, count in (("cats", 12), ("dogs", 4))
    ]
    assert sorted(rows.tolist()) == sorted(torch.cat(alone).tolist())
    assert notes == []
    again, _ = rows_of(files, model, source={"cats": 6, "dogs": 2}, samples=16, sequence_length=20)
    assert torch.equal(again, rows)


def test_a_source_with_little_text_gives_fewer_rows_and_is_named(files: dict[str, Path], model: SimpleNamespace):
    write_text(files["dogs"], "Dog {} barks.", rows=20)
    rows, notes = rows_of(files, model, source={"cats": 1, "dogs": 1}, samples=40, sequence_length=20)
    dogs = len(token_rows(Reader(model.tokenizer()), files["dogs"], "fitted", 20, 20, seed=0))
    assert 1 <= dogs < 20
    assert len(rows) == 20 + dogs
    assert notes == [f"warning: dogs fills only {dogs} of 20 samples"]


# What depends on it


def test_the_key_is_that_of_the_rows(files: dict[str, Path]):
    def key(source: object, divided_sources: tuple[str, ...] = ("cats", "dogs")) -> str:
        return calibration_key(CalibrationOptions(source=source, samples=8), files, divided_sources)

    assert key("cats") == key({"cats": 2})
    assert key({"cats": 3, "dogs": 1}) == key({"cats": 6, "dogs": 2})
    sources = ["cats", "dogs", {"cats": 3, "dogs": 1}, {"cats": 1, "dogs": 1}, {"dogs": 3, "cats": 1}]
    assert len(set(map(key, sources))) == len(sources)
    assert key("cats", ("cats",)) == key("cats") != key("cats", ())


def test_a_run_on_two_sources(make_checkpoint: MakeCheckpoint, files: dict[str, Path], tmp_path: Path):
    def recipe(folder: str, source: object, measure_on: str | None = None) -> Path:
        calibration = {"source": source, "samples": 8, "sequence_length": 32}
        evaluation = EVALUATION | {"perplexity": EVALUATION["perplexity"] | {"source": measure_on}}
        stages = [DEPTH, {"stage": "ffn", "intermediate_size": 64}]
        return write_recipe(
            tmp_path / folder, make_checkpoint(), stages, calibration=calibration, evaluation=evaluation
        )

    def measured(recipe: Path) -> float:
        return json.loads((recipe.parent / "out" / "metrics.json").read_text())["stages"][0]["perplexity"]

    cats, dogs = map(str, files.values())
    mixed, one, other = recipe("mixed", {cats: 3, dogs: 1}), recipe("one", cats), recipe("other", dogs)
    for file in (mixed, one, other):
        run(file)
    assert measured(mixed) == measured(one) != measured(other)  # of the source model, on the first source named
    assert not same_tensors(stage_folders(mixed.parent / "out")[-1], stage_folders(one.parent / "out")[-1])
    assert "finished before, reused" in run(recipe("mixed", {cats: 6, dogs: 2}, measure_on=dogs))
    assert measured(mixed) == measured(other)
    assert "changed: done again" in run(recipe("mixed", {cats: 1, dogs: 1}))


# As recipes give it


def recipe_with(folder: Path, source: str, samples: int = 4, length: int = 32) -> Path:
    """A recipe whose `source:` stands in line 5."""
    file = folder / "recipe.yaml"
    file.write_text(
        f"name: mixed\nmodel: {{source: {QWEN}}}\ncalibration:\n  sequence_length: {length}\n  source:{source}\n"
        f"  samples: {samples}\nstages:\n  - {{stage: ffn, intermediate_size: 9216}}\n  - {{stage: refit}}\n"
    )
    return file


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (" {}", ["line 5: calibration.source: ", "at least one"]),
        (" {python-docs: 0}", ["line 5: calibration.source.python-docs: given 0: must be greater than 0"]),
        (" {python-docs: .inf}", ["line 5: calibration.source.python-docs: given inf: must be a finite number"]),
        (
            "\n    python-docs: -1\n    ../a.jsonl: .nan",
            [
                "2 problems",
                "line 6: calibration.source.python-docs: given -1: must be greater than 0",
                "line 7: calibration.source[../a.jsonl]: given nan: must be a finite number",
            ],
        ),
        (" {python-docs: yes}", ["line 5: calibration.source.python-docs: given True: must be a valid number"]),
        (" {python-docs: '3'}", ["line 5: calibration.source.python-docs: given '3': must be a valid number"]),
        (" [python-docs]", ["line 5: calibration.source: ", "a mapping of text sources to shares"]),
        (" {a: 1, b: 1, c: 1, d: 1, e: 1}", ["line 6: calibration.samples: given 4: ", "each of the 5 sources"]),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, source: str, words: list[str]):
    assert_says(refusal("plan", recipe_with(tmp_path, source)), *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"python-docs": 1, "none.jsonl": 1}, ["calibration.source: no file 'none.jsonl'"]),
        ({"cats.jsonl": 1, "./cats.jsonl": 1}, ["calibration.source: ", "cats.jsonl is named twice"]),
        ({"cats.jsonl": 1, "few.jsonl": 1}, ["few.jsonl: the calibration split has", "not enough for one row"]),
    ],
)
def test_sources_that_cannot_be(
    make_checkpoint: MakeCheckpoint, files: dict[str, Path], tmp_path: Path, source: dict[str, int], words: list[str]
):
    write_text(tmp_path / "few.jsonl", "Few.", rows=1)
    calibration = {"source": source, "samples": 4, "sequence_length": 32}
    recipe = write_recipe(tmp_path, make_checkpoint(), [DEPTH], calibration=calibration)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_the_sources_of_a_recipe_replace_those_of_its_base(tmp_path: Path):
    base = recipe_with(tmp_path, " {a.jsonl: 1, b.jsonl: 2}")
    top = tmp_path / "top.yaml"
    top.write_text("base: recipe.yaml\ncalibration: {source: {c.jsonl: -1, d.jsonl: 3}}\n")
    assert_says(refusal("plan", top), "1 problem", "line 2: calibration.source[c.jsonl]: given -1")
    top.write_text("base: recipe.yaml\ncalibration: {source: {c.jsonl: 1, d.jsonl: 3}, samples: 8}\n")
    options = load_recipe(top).calibration
    assert options.rows == {"c.jsonl": 2, "d.jsonl": 6}
    assert options.sequence_length == 32
    assert load_recipe(base, ["calibration.source={e.jsonl: 1}"]).calibration.source == {"e.jsonl": 1}


@pytest.mark.parametrize(("samples", "few"), [(575, True), (576, False)])
def test_too_few_tokens_for_a_refit_are_warned_of(tmp_path: Path, samples: int, few: bool):
    said = plan(recipe_with(tmp_path, " python-docs", samples, length=32))["warnings"]
    warnings = [warning for warning in said if not warning.startswith("disk: ")]
    assert len(warnings) == few
    if few:
        assert_says(warnings[0], "02-refit", "575 samples x 32 = 18400 calibration tokens", "9216 inputs", "to 576")


def test_plan_says_that_a_text_is_missing(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    source = {"python-docs": 3, "nowhere.jsonl": 1}
    recipe = write_recipe(
        tmp_path, make_checkpoint("glm"), [{"stage": "refit"}], calibration={"source": source, "samples": 8}
    )
    result = invoke("plan", recipe)
    assert result.exit_code == 2
    assert "nowhere.jsonl" in result.output
