"""`evaluate`: the same scores as a recipe's stage, of any checkpoint, in one file that `compare` reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.tokens import batched, token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.hashing import sha256
from support.command_line import assert_says, refusal
from support.quantizing import plain_model
from support.questions import QUESTIONS, write, write_quiz
from support.running import compress, invoke, run, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
INT4 = {
    "stage": "quantize",
    "name": "int4",
    "bits": 4,
    "group_size": 32,
    "method": "round_to_nearest",
    "max_divergence": 100,
}
SHORT = ("--samples", 2, "--sequence-length", 32)


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz"), "anatomy", "rivers")


@pytest.fixture(scope="module")
def int4(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tmp_path_factory.mktemp("int4"), make_checkpoint("glm"), INT4)


def evaluate(checkpoint: Path, output: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What `evaluate` wrote, and what it printed with runs of spaces as one."""
    result = invoke("evaluate", checkpoint, "--output", output, "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text()), " ".join(result.output.split())


def results_of(record: dict[str, Any]) -> dict[str, Any]:
    return {task: entry["result"] for task, entry in record["tasks"].items()}


def test_the_results_are_those_of_a_recipe(make_checkpoint: MakeCheckpoint, quiz: Path, tmp_path: Path):
    source = make_checkpoint("glm")
    mmlu = {"data": str(quiz), "num_fewshot": 1, "limit": 5}
    perplexity = {"samples": 2, "sequence_length": 32}
    recipe = write_recipe(
        tmp_path, source, [INT4, {"stage": "evaluate"}], evaluation={"mmlu": mmlu, "perplexity": perplexity}
    )
    run(recipe)
    folder = tmp_path / "out"
    asked = ("--mmlu", quiz, "--num-fewshot", 1, "--limit", 5, *SHORT)
    for checkpoint, name in ((source, "00-source"), (folder / "01-int4", "01-int4")):
        record, output = evaluate(checkpoint, tmp_path / f"{name}.json", *asked)
        kept = folder / "evaluations" / f"{name}.json"
        assert results_of(record) == results_of(json.loads(kept.read_text()))
        again = invoke("compare", kept, tmp_path / f"{name}.json")
        assert again.exit_code == 0
        assert "not one log-likelihood changed; of 10 questions" in again.output
    found = results_of(record)
    assert_says(output, "stem", "mmlu", f"{100 * found['mmlu']['accuracy']:.1f}%", "10 questions", "62 tokens")
    stage = json.loads((folder / "02-evaluate" / "stage.json").read_text())["decisions"]
    assert stage["mmlu"]["accuracy"] == found["mmlu"]["accuracy"]
    assert stage["perplexity"]["value"] == found["perplexity"]["value"]
    # Every question is in evaluations/, and nowhere else.
    rows = json.loads((folder / "metrics.json").read_text())["stages"]
    for summary in (stage, *(row["evaluations"] for row in rows)):
        assert "records" not in summary["mmlu"]["subjects"]["anatomy"]
        assert "rows" not in summary["perplexity"]


def test_what_is_on_record(make_checkpoint: MakeCheckpoint, quiz: Path, tmp_path: Path):
    source = make_checkpoint("glm")
    arguments = ("--mmlu", quiz, "--subjects", "rivers", "--num-fewshot", 2, *SHORT)
    record, output = evaluate(source, tmp_path / "out.json", *arguments)
    assert record["schema_version"] == 1
    assert record["checkpoint"]["folder"] == str(source)
    files = record["checkpoint"]["files"]
    assert files["model.safetensors"]["sha256"] == sha256(source / "model.safetensors")
    assert {"config.json", "tokenizer.json"} < set(files)
    assert record["device"] == "cpu"
    assert {"python", "torch", "lm-eval", "autoglm-compress"} <= set(record["versions"])
    assert record["resources"]["seconds"] > 0
    assert record["resources"]["peak_rss_bytes"] > 1e6
    assert record["tasks"]["mmlu"]["settings"] == {
        "data": str(quiz),
        "subjects": ["rivers"],
        "num_fewshot": 2,
        "limit": None,
    }
    assert record["tasks"]["perplexity"]["settings"].items() >= {"samples": 2, "sequence_length": 32, "seed": 0}.items()
    result = record["tasks"]["mmlu"]["result"]
    assert list(result["subjects"]) == ["rivers"]
    assert result["categories"] == {}
    assert "rivers" in output
    assert len(record["tasks"]["perplexity"]["result"]["rows"]) == 2


def test_against_another(make_checkpoint: MakeCheckpoint, int4: Path, tmp_path: Path):
    source = make_checkpoint("glm")
    record, output = evaluate(int4, tmp_path / "out.json", "--tasks", "perplexity", "--against", source, *SHORT)
    found = record["tasks"]["agreement"]["result"]
    rows = token_rows(Reader(Checkpoint(source).tokenizer()), None, "held-out", 2, 32, 0)
    expected, changed = (log_probabilities(folder, rows) for folder in (source, int4))
    assert found["divergence"] == pytest.approx(float((expected.exp() * (expected - changed)).sum(-1).mean()), rel=1e-2)
    assert found["top1"] == pytest.approx(float((expected.argmax(-1) == changed.argmax(-1)).float().mean()), abs=0.05)
    assert found["tokens"] == 64
    against = record["tasks"]["agreement"]["settings"]["against"]
    assert against["files"]["model.safetensors"]["sha256"] == sha256(source / "model.safetensors")
    assert_says(output, "divergence", "nats", "same top token", "64 tokens")
    by_row = (expected.exp() * (expected - changed)).sum(-1).mean(1)
    assert found["rows"]["divergence"] == pytest.approx(by_row.tolist(), rel=1e-2)
    gated = ("compare", tmp_path / "out.json", tmp_path / "out.json", "--confidence", 0.6, "--max-divergence")
    assert invoke(*gated, 100 * found["divergence"]).exit_code == 0
    assert invoke(*gated, found["divergence"] / 100).exit_code == 1
    record, _ = evaluate(source, tmp_path / "same.json", "--tasks", "perplexity", "--against", source, *SHORT)
    assert record["tasks"]["agreement"]["result"].items() >= {"divergence": 0, "top1": 1}.items()


@torch.no_grad()
def log_probabilities(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """Of next tokens [rows, length, vocab_size], by transformers, from the weights as our reader dequantizes them."""
    return torch.cat([plain_model(Checkpoint(folder)).float()(batch).logits for batch in batched(rows)]).log_softmax(-1)


def test_a_text_of_ones_own(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{'Some words stand here. ' * 100}Paragraph {number}." for number in range(60)))
    arguments = ("--tasks", "perplexity", "--text", text, "--samples", 10_000, "--sequence-length", 64)
    record, output = evaluate(make_checkpoint("glm"), tmp_path / "out.json", *arguments)
    rows = len(record["tasks"]["perplexity"]["result"]["rows"])
    assert f"warning: the text fills only {rows} of 10000 samples" in output
    evaluate(make_checkpoint("glm"), tmp_path / "other.json", "--tasks", "perplexity", *SHORT)
    message = refusal("compare", tmp_path / "out.json", tmp_path / "other.json", "--max-perplexity-increase", 1)
    assert_says(message, "not of the same tokens", "--text")


def test_mistakes_leave_the_file_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source, output = make_checkpoint("glm"), tmp_path / "out.json"
    output.write_text("before")
    quiz = write_quiz(tmp_path / "quiz", "anatomy", "rivers")
    write(quiz / "test" / "rivers_test.csv", [QUESTIONS[0], QUESTIONS[1][:5]])

    def refused(*arguments: object) -> str:
        return refusal("evaluate", source, "--output", output, *SHORT, *arguments)

    assert_says(refused("--mmlu", quiz, "--num-fewshot", 0), "rivers_test.csv, line 2: 5 fields, expected 6")
    assert_says(refused("--mmlu", quiz, "--subjects", "anatomi"), "no subject 'anatomi'", "Did you mean anatomy?")
    assert_says(refused("--mmlu", quiz, "--subjects", "anatomy"), "2 examples, but num_fewshot is 5")
    (quiz / "dev" / "anatomy_dev.csv").unlink()
    assert_says(refused("--mmlu", quiz, "--subjects", "anatomy"), "no anatomy_dev.csv", "num_fewshot")
    assert_says(refused("--mmlu", tmp_path / "none"), "--mmlu: no folder", "none")
    assert_says(refused("--mmlu", tmp_path), "no such folder, or no CSV files", "MMLU needs test/")
    assert output.read_text() == "before"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "mmlus"], ["unknown evaluation task 'mmlus'"]),
        (["--tasks", "perplexity,"], ["--tasks: given 'perplexity,'", "commas"]),
        (["--tasks", "gsm8k"], ["generates text"]),
        (["--tasks", "perplexity", "--limit", "3"], ["--limit", "for the task mmlu"]),
        (["--tasks", "mmlu", "--samples", "3"], ["--samples", "for the task perplexity and for --against"]),
        (["--tasks", "perplexity", "--text", "none.txt"], ["--text: no file 'none.txt'"]),
        (["--tasks", "perplexity", "--against", "none"], ["none: no such folder"]),
        (["--tasks", "perplexity", "--sequence-length", "100000000"], ["not enough for one row"]),
    ],
)
def test_options_that_cannot_be(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, arguments: list[str], words: list[str]
):
    message = refusal("evaluate", make_checkpoint("glm"), "--output", tmp_path / "out.json", *arguments)
    assert_says(message, *words)
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range_are_usage_errors(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    for option, value in (("--limit", 0), ("--num-fewshot", -1), ("--samples", 0), ("--sequence-length", 1)):
        result = invoke("evaluate", make_checkpoint("glm"), "--output", tmp_path / "out.json", option, value)
        assert result.exit_code == 2
        assert option in result.output


def test_places_that_cannot_be_written(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint("glm")
    assert_says(refusal("evaluate", source, "--output", tmp_path), f"--output: {tmp_path} is a folder")
    message = refusal("evaluate", source, "--output", tmp_path / "no" / "out.json")
    assert_says(message, f"--output: no folder {tmp_path / 'no'}")
    assert_says(refusal("evaluate", tmp_path, "--output", tmp_path / "out.json"), "no config.json")


def test_models_that_read_other_tokens(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source, other = make_checkpoint("glm"), tmp_path / "other"
    arguments = ("evaluate", source, "--tasks", "perplexity", "--output", tmp_path / "out.json", *SHORT)
    message = refusal(*arguments, "--against", make_checkpoint("glm", vocab_size=640))
    assert_says(message, "--against", "vocab_size of 640", "512")
    shutil.copytree(source, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_says(refusal(*arguments, "--against", other), "--against: the tokenizers of", "other tokens")
