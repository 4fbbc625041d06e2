"""`inspect`, and what the command line says about itself."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from autoglm_compress.cli import app
from support.command_line import assert_says, refusal
from support.models import FAMILIES, SHAPE
from support.running import compress, invoke, tensors_of

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
INT4 = {"stage": "quantize", "bits": 4, "group_size": 32, "method": "round_to_nearest"}


def inspect(*arguments: object) -> str:
    """The lines of `inspect`, with runs of spaces as one."""
    result = invoke("inspect", *arguments)
    assert result.exit_code == 0, result.output
    return "\n".join(" ".join(line.split()) for line in result.output.splitlines())


def inspect_json(checkpoint: Path) -> dict[str, Any]:
    result = invoke("inspect", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint(family: str, make_checkpoint: MakeCheckpoint):
    checkpoint = make_checkpoint(family)
    tensors = tensors_of(checkpoint)
    found = inspect_json(checkpoint)
    assert found["shape"].items() >= SHAPE.items()
    assert found["shape"]["architecture"] == json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    assert found["shape"]["quantization"] is None
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    parts = found["parameters_by_part"]
    assert sum(parts.values()) == found["parameters"]
    assert parts["embedding"] == parts["head"] == SHAPE["vocab_size"] * SHAPE["hidden_size"]
    assert parts["ffn"] == sum(tensor.numel() for name, tensor in tensors.items() if ".mlp." in name)
    assert found["bytes_by_dtype"] == {"bfloat16": found["bytes"]}
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["files"] == ["model.safetensors"]
    assert found["tokenizer"]
    assert found["transformers"] == {"loads": True, "reason": None, "missing": [], "different_shape": []}


def test_a_tied_checkpoint_has_no_head(make_checkpoint: MakeCheckpoint):
    found = inspect_json(make_checkpoint("llama", tie_word_embeddings=True))
    assert found["shape"]["tie_word_embeddings"]
    assert found["parameters_by_part"]["head"] == 0
    assert found["transformers"]["loads"]


def test_a_quantized_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = compress(tmp_path, make_checkpoint("glm"), INT4)
    found = inspect_json(checkpoint)
    assert found["shape"]["quantization"]["bits"] == 4
    assert set(found["shape"]["quantization"]["group_sizes"].values()) == {32}
    assert found["parameters"] == inspect_json(make_checkpoint("glm"))["parameters"]
    assert set(found["bytes_by_dtype"]) == {"bfloat16", "int32", "int64"}
    assert found["transformers"]["loads"]
    assert_says(inspect(checkpoint), "quantization INT4", "group size 32", "plain transformers loads it")


def test_an_awq_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = compress(tmp_path, make_checkpoint("glm"), INT4 | {"format": "awq"})
    found = inspect_json(checkpoint)
    quantization = found["shape"]["quantization"]
    assert (quantization["format"], quantization["symmetric"], quantization["bits"]) == ("awq", False, 4)
    assert set(quantization["group_sizes"].values()) == {32}
    assert found["parameters"] == inspect_json(make_checkpoint("glm"))["parameters"]
    assert set(found["bytes_by_dtype"]) == {"bfloat16", "float16", "int32"}
    assert_says(inspect(checkpoint), "INT4", "awq")


def test_a_checkpoint_of_mixed_bits(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stage = INT4 | {"bits": "auto", "budget": {"average_bits": 6}, "head_bits": 8}
    found = inspect_json(compress(tmp_path, make_checkpoint("glm"), stage))
    quantization = found["shape"]["quantization"]
    assert quantization["bits"] == [4, 8]
    assert quantization["bits_by_linear"]["lm_head"] == 8
    assert found["transformers"]["loads"]
    assert_says(inspect(tmp_path / "out/01-quantize"), "INT4", "INT8", "lm_head", "-1: lm_head")


def test_a_checkpoint_quantized_by_someone_else(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = compress(tmp_path, make_checkpoint("glm"), INT4)
    config = json.loads((checkpoint / "config.json").read_text())

    def with_quantization(**changes: object) -> Path:
        quantization = {"quantization_config": config["quantization_config"] | changes}
        (checkpoint / "config.json").write_text(json.dumps(config | quantization))
        return checkpoint

    [group] = config["quantization_config"]["config_groups"].values()
    as_llm_compressor = with_quantization(config_groups={"group_0": group | {"targets": ["Linear"]}})
    assert len(inspect_json(as_llm_compressor)["shape"]["quantization"]["group_sizes"]) == 6
    message = refusal("inspect", with_quantization(quant_method="gptq", format=None))
    assert_says(message, checkpoint / "config.json", "quantized as gptq", "compressed-tensors pack-quantized and awq")
    message = refusal("inspect", with_quantization(quant_method="awq", format=None))
    assert_says(message, checkpoint / "config.json", "only the awq layout with bits 4", "'bits': None")
    message = refusal("inspect", with_quantization(config_groups={}))
    assert_says(message, checkpoint / "config.json", "config_groups", "self_attn.q_proj")


def test_a_checkpoint_that_transformers_cannot_build(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = shutil.copytree(make_checkpoint("glm"), tmp_path / "model")
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace('"silu"', '"newest_activation"'))
    assert not inspect_json(checkpoint)["transformers"]["loads"]
    assert_says(inspect(checkpoint), "plain transformers cannot load it", "newest_activation")


def test_what_a_person_reads(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    checkpoint = shutil.copytree(make_checkpoint("glm4"), tmp_path / "model")
    shown = inspect(checkpoint)
    expected = {
        "architecture": "Glm4ForCausalLM",
        "num_hidden_layers": "4",
        "num_key_value_heads": "2",
        "dtype": "bfloat16",
        "parameters: embedding": "32.8k (13.2%)",
        "parameters: ffn": "98.3k (39.7%)",
        "bytes by dtype": "bfloat16 495kB",
        "tokenizer": "yes",
        "loading class": "AutoModelForCausalLM",
        "plain transformers": "loads it",
    }
    assert_says(shown, *(f"{name} {value}\n" for name, value in expected.items() if name != "plain transformers"))
    assert shown.splitlines()[-1] == "plain transformers loads it"
    assert max(map(len, invoke("inspect", checkpoint).output.splitlines())) <= 80
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert_says(inspect(checkpoint), "tokenizer no\n")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    assert_says(refusal("inspect", tmp_path / "none"), "none: no such folder")
    assert_says(refusal("inspect", tmp_path), f"{tmp_path}: no config.json")


def help_of(*command: str) -> str:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["fits a phone", "run", "plan", "inspect", "--version", "--install-completion"]),
        (("run",), ["RECIPE", "--output", "runs/NAME-OF-RECIPE", "--set", "KEY=VALUE", "--from", "--until", "--fresh"]),
        (("run",), ["--device", "auto", "cpu", "cuda", "Finished stages are skipped"]),
        (("plan",), ["RECIPE", "reading no weights", "--json", "bytes", "--set", "--output"]),
        (("inspect",), ["CHECKPOINT", "--json", "quantization"]),
        (("report",), ["RUN", "--output", "report.html", "comparison.html", "no network"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_fits_80_columns_and_names_everything(
    command: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(*command)
    assert max(map(len, text.splitlines())) <= 80
    assert_says(re.sub(r"[\s│]+", " ", text), *words)


def test_every_command_and_option_is_explained():
    commands = get_command(app).commands
    assert set(commands) >= {"run", "plan", "inspect"}
    for name, command in commands.items():
        for what, text in {name: command.help, **{f"{name} {o.name}": o.help for o in command.params}}.items():
            assert text, f"{what} has no help"
            assert text.strip().endswith((".", "]")), f"{what}: {text}"


def test_no_arguments_give_the_help():
    assert invoke().output.split() == help_of().split()


def test_version():
    assert invoke("--version").output == f"autoglm-compress {version('autoglm-compress')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compress",), ["No such command 'compress'"]),
        (("plan",), ["Missing argument 'RECIPE'"]),
        (("run", "recipe.yaml", "--device", "tpu"), ["--device", "'tpu'", "cuda"]),
        (("run", "recipe.yaml", "--restart"), ["--restart"]),
    ],
)
def test_a_command_line_that_cannot_be_ends_with_usage_and_exit_code_2(arguments: tuple[str, ...], words: list[str]):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert_says(result.output, "Usage:", *words)
