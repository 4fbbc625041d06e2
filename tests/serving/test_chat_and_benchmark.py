"""`chat` and `benchmark`, with llama.cpp."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoglm_compress.cli import app
from support.command_line import assert_says, refusal
from support.running import invoke
from support.thinker import ANSWER, ASKED, THOUGHT


def test_two_models_are_told_the_same(thinker_gguf: Path, tmp_path: Path) -> None:
    [file] = thinker_gguf.glob("*.gguf")
    (tmp_path / "picture.txt").write_text("no image")
    lines = [ASKED[0], "", f"/image {tmp_path / 'picture.txt'}", f"/image {tmp_path / 'none.png'}"]
    result = CliRunner().invoke(
        app, ["chat", str(thinker_gguf), "--against", str(file), "--max-model-len", "512"], input="\n".join(lines)
    )
    assert result.exit_code == 0, result.output
    assert result.output.count(f"--- {file.stem}\n{THOUGHT}{ANSWER}\n") == 2
    assert_says(result.output, "picture.txt: not the name of an image", "none.png: No such file")


def test_what_a_person_would_feel(thinker_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    counts = ("--prompt-tokens", "64,16", "--new-tokens", 8, "--starts", 2, "--max-model-len", 512)
    result = invoke("benchmark", thinker_gguf, *counts, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert (found["engine"], found["new_tokens"], found["starts"]) == ("llama.cpp", 8, 2)
    short, long = found["prompts"]
    assert 8 <= short["prompt_tokens"] < 40 < long["prompt_tokens"] < 160
    values = [found["load_seconds"], found["peak_rss_bytes"]]
    values += [prompt[name] for prompt in (short, long) for name in ("first_token_seconds", "tokens_per_second")]
    assert all(0 < value["least"] <= value["median"] <= value["most"] for value in values)
    assert found["peak_rss_bytes"]["least"] > sum(part.stat().st_size for part in thinker_gguf.glob("*.gguf"))
    assert_says(result.output, "peak memory", f"first token after {long['prompt_tokens']}")


@pytest.mark.parametrize("given", ["0", "a", "500"])
def test_prompts_that_cannot_be(thinker_gguf: Path, given: str) -> None:
    message = refusal("benchmark", thinker_gguf, "--prompt-tokens", given, "--max-model-len", 512)
    assert_says(message, f"--prompt-tokens {given}")


def test_results_that_have_no_place(thinker_gguf: Path, tmp_path: Path) -> None:
    assert_says(refusal("benchmark", thinker_gguf, "--json", tmp_path / "none" / "speed.json"), "no such folder")
