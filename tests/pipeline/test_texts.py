"""Texts of a recipe: read before work starts, and cut into rows that the model reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.command_line import assert_says, plan, refusal
from support.running import invoke, run, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
DEPTH = {"stage": "depth", "num_hidden_layers": 2}
RANDOM = {"stage": "ffn", "intermediate_size": 64, "method": "random"}
QUANTIZE = {"stage": "quantize", "bits": 8, "group_size": 32, "method": "round_to_nearest", "max_divergence": 100}
SHORT = {"max_position_embeddings": 40}
LINES = "\n".join(f"Line {number} says {number * number}, and so on." for number in range(2000))


def calibration(text: str, file: Path, **options: int) -> dict:
    file.write_text(text)
    return {"source": str(file), "samples": 2, "sequence_length": 32} | options


# Too little text


def test_lines_without_blank_ones_are_enough_to_measure_on(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    recipe = write_recipe(
        tmp_path,
        make_checkpoint("llama"),
        [DEPTH],
        calibration=calibration(LINES, tmp_path / "log.txt"),
        evaluation={"every_stage": ["perplexity"], "perplexity": {"samples": 4, "sequence_length": 32}},
    )
    assert plan(recipe)["warnings"] == []
    run(recipe)
    rows = json.loads((tmp_path / "out" / "evaluations" / "01-depth.json").read_text())
    assert len(rows["tasks"]["perplexity"]["result"]["rows"]) == 4


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_plan_says_that_no_text_is_held_out(make_checkpoint: MakeCheckpoint, tmp_path: Path, has_tokenizer: bool):
    model = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    if not has_tokenizer:
        for file in model.glob("tokenizer*"):
            file.unlink()
    text = calibration("A single paragraph. " * 50, tmp_path / "few.txt")
    measured = {"every_stage": ["perplexity"], "perplexity": {"samples": 4, "sequence_length": 32}}
    recipe = write_recipe(tmp_path, model, [DEPTH], calibration=text, evaluation=measured)
    assert_says(refusal("plan", recipe), "few.txt: the held-out split has 0 tokens", "Give more text")
    if has_tokenizer:
        refusal("run", recipe, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    recipe = write_recipe(tmp_path, model, [DEPTH], calibration=text)  # nothing is measured
    assert plan(recipe)["warnings"] == []
    recipe = write_recipe(tmp_path, model, [QUANTIZE], calibration=text)
    [warning] = plan(recipe)["warnings"]
    assert_says(
        warning,
        "check of quantized checkpoints and exports is on calibration rows",
        "few.txt: the held-out split has 0",
    )


def test_little_held_out_text_is_warned_of(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text = calibration(LINES, tmp_path / "log.txt")
    measured = {"every_stage": ["perplexity"], "perplexity": {"samples": 10_000, "sequence_length": 32}}
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [DEPTH], calibration=text, evaluation=measured)
    [warning] = plan(recipe)["warnings"]
    assert_says(warning, "perplexity: ", "log.txt fills only ", " of 10000 samples")
    result = invoke("plan", recipe)
    assert f"warning: {warning}" in result.output
    assert f"warning: {warning}" in run(recipe)


def test_a_plan_says_that_calibration_text_does_not_fill_a_row(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text = calibration('{"text": "Few words."}\n', tmp_path / "few.jsonl")
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [DEPTH], calibration=text)
    assert_says(refusal("plan", recipe), "few.jsonl: the calibration split has", "not enough for one row")
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [RANDOM], calibration=text)  # reads no text
    assert plan(recipe)["warnings"] == []


def test_a_plan_names_a_row_that_is_no_document(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text = calibration('{"text": "good"}\n{"txt": "bad"}\n', tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [DEPTH], calibration=text)
    assert_says(refusal("plan", recipe), "rows.jsonl:2: expected")


# Rows as long as the model reads


def test_rows_are_no_longer_than_the_model_reads_where_the_recipe_leaves_it_open(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    stages = [DEPTH, {"stage": "heal", "tokens": 400, "batch_size": 2, "checks": 1}, {"stage": "evaluate"}]
    given = {"calibration": {"samples": 4}, "evaluation": {"every_stage": ["perplexity"], "perplexity": {"samples": 2}}}
    stages[2] |= {"tasks": ["perplexity"]}
    model = make_checkpoint("llama", **SHORT)
    recipe = write_recipe(tmp_path, model, stages, **given)
    plan(recipe)
    run(recipe)
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert kept["calibration"]["sequence_length"] == kept["evaluation"]["perplexity"]["sequence_length"] == 40
    measured = json.loads((tmp_path / "out" / "evaluations" / "00-source.json").read_text())
    output = tmp_path / "out.json"
    result = invoke("evaluate", model, "--tasks", "perplexity", "--samples", 2, "--output", output, "--device", "cpu")
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())["tasks"]["perplexity"]
    assert record["settings"]["sequence_length"] == 40
    assert record["result"] == measured["tasks"]["perplexity"]["result"]
    assert record["result"]["tokens"] == 2 * 39
    # What is said is kept, and the keys are those of the same length said.
    said = {"calibration": {"samples": 4, "sequence_length": 40}, "evaluation": given["evaluation"]}
    write_recipe(tmp_path, model, stages, **said)
    assert "running" not in run(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"sequence_length": 41}}, ["calibration.sequence_length: 41", "is 40"]),
        (
            {"evaluation": {"every_stage": ["perplexity"], "perplexity": {"sequence_length": 41}}},
            ["evaluation.perplexity.sequence_length: 41", "is 40"],
        ),
        ({"evaluation": {"perplexity": {"sequence_length": 41}}}, []),
        ({"evaluation": {}}, []),
    ],
    ids=["calibration", "perplexity", "perplexity that is not measured", "nothing said"],
)
def test_what_a_recipe_says_is_refused_where_it_matters(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, changes: dict, words: list[str]
):
    changes = {"calibration": {"samples": 2, "sequence_length": 32}} | changes
    recipe = write_recipe(tmp_path, make_checkpoint("llama", **SHORT), [DEPTH], **changes)
    if words:
        assert_says(refusal("plan", recipe), "1 problem", *words)
    else:
        plan(recipe)
