"""A tokenizer with more tokens than the model has rows for: transformers loads it, and fails where one is used."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.command_line import assert_says, refusal
from support.evaluating import make_model
from support.running import compress, invoke, write_recipe

FFN = {"stage": "ffn", "intermediate_size": 24}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A vocabulary of 320, and the added token 320 beside it."""
    folder = make_model(tmp_path / "model", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_added_tokens_that_no_text_has_are_no_reason_to_refuse(model: Path, tmp_path: Path):
    made = compress(tmp_path, model, FFN)
    assert len(AutoTokenizer.from_pretrained(made)) == 321
    options = ("--tasks", "perplexity", "--samples", 2, "--sequence-length", 32, "--output", tmp_path / "results.json")
    assert invoke("evaluate", made, *options).exit_code == 0


def test_an_added_token_in_the_text_is_named(model: Path, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    documents = [f"{number} the answer <more> of {number} questions " * 60 for number in range(200)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    calibration = {"source": str(text), "samples": 4, "sequence_length": 32}
    recipe = write_recipe(tmp_path, model, [FFN], calibration=calibration)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), model, "token 320", "vocab_size of 320")
    options = ("--tasks", "perplexity", "--text", text, "--sequence-length", 32, "--output", tmp_path / "results.json")
    assert_says(refusal("evaluate", model, *options), model, "token 320", "vocab_size in config.json is 320")
