"""Options of the quantize stage that cannot be, and models that it cannot take: one clear message, exit code 2."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization.loading_probe import transformers_loads
from support.command_line import assert_says, plan, refusal
from support.running import compress, run, stage_folders, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
INT4 = {"stage": "quantize", "bits": 4, "group_size": 32}
AUTO = INT4 | {"bits": "auto", "budget": {"average_bits": 5}}
COMMANDS = pytest.mark.parametrize("command", ["plan", "run"])

WRONG = {
    "group size 0": (INT4 | {"group_size": 0}, ["group_size: given 0", "32, 64, 128 or -1"]),
    "group size 48": (INT4 | {"group_size": 48}, ["group_size: given 48", "32, 64, 128 or -1"]),
    "group size that does not divide": (
        INT4 | {"group_size": 128},
        ["group_size: 128 does not divide the 64 input features", "more; sizes that do for all linears: 64, 32, -1"],
    ),
    "3 bits": (INT4 | {"bits": 3}, ["bits: given 3", "4, 8 or 'auto'"]),
    "bits in quotes": (INT4 | {"bits": "4"}, ["bits: given '4'", "4, 8 or 'auto'; write 4 without quotes"]),
    "bits misspelt": (INT4 | {"bits": "atuo"}, ["bits: given 'atuo'", "4, 8 or 'auto'"]),
    "no bits": ({"stage": "quantize"}, ["bits: missing"]),
    "budget without auto": (INT4 | {"budget": {"average_bits": 5}}, ["budget: `bits: auto` needs a budget"]),
    "auto without budget": (INT4 | {"bits": "auto"}, ["budget: `bits: auto` needs a budget", "bytes", "average_bits"]),
    "both budgets": (
        AUTO | {"budget": {"bytes": 10**9, "average_bits": 5}},
        ["budget: ", "expected one of bytes and average_bits"],
    ),
    "an empty budget": (AUTO | {"budget": {}}, ["budget: ", "expected one of bytes and average_bits"]),
    "a budget that is a number": (AUTO | {"budget": 10**9}, ["budget: given 1000000000", "expected a mapping"]),
    "misspelled budget": (AUTO | {"budget": {"byte": 10**9}}, ["budget.byte: unknown key", "bytes"]),
    "a fraction of bytes": (AUTO | {"budget": {"bytes": 1e9 + 0.5}}, ["budget.bytes: ", "whole number"]),
    "no bytes": (AUTO | {"budget": {"bytes": 0}}, ["budget.bytes: given 0", "greater than 0"]),
    "3 bits on average": (AUTO | {"budget": {"average_bits": 3}}, ["budget.average_bits: given 3", "equal to 4"]),
    "9 bits on average": (AUTO | {"budget": {"average_bits": 9}}, ["budget.average_bits: given 9", "equal to 8"]),
    "not a number of bits": (AUTO | {"budget": {"average_bits": float("nan")}}, ["budget.average_bits: given nan"]),
    "a 4-bit head": (INT4 | {"head_bits": 4}, ["head_bits: given 4", "8 or 16"]),
    "awq in 8 bits": (INT4 | {"format": "awq", "bits": 8}, ["format: awq holds 4 bits", "compressed-tensors"]),
    "symmetric awq": (INT4 | {"format": "awq", "symmetric": True}, ["format: awq", "asymmetric"]),
    "zero points and a head": (INT4 | {"symmetric": False, "head_bits": 8}, ["symmetric: false", "same bits"]),
    "zero points and auto": (AUTO | {"symmetric": False}, ["symmetric: false", "same bits"]),
    "awq with a head": (INT4 | {"format": "awq", "head_bits": 8}, ["format: awq", "16-bit head"]),
    "mixed awq": (AUTO | {"format": "awq"}, ["format: awq holds 4 bits"]),
    "another format": (INT4 | {"format": "gguf"}, ["format: given 'gguf'", "awq, compressed-tensors"]),
    "another method": (INT4 | {"method": "gptq"}, ["method: given 'gptq'", "awq, round_to_nearest"]),
    "another backend": (INT4 | {"backend": "gptq"}, ["backend: given 'gptq'", "autoawq, own"]),
    "autoawq in another format": (INT4 | {"backend": "autoawq"}, ["backend: autoawq", "`format: awq` alone"]),
    "autoawq without a search": (
        INT4 | {"backend": "autoawq", "format": "awq", "method": "round_to_nearest"},
        ["backend: autoawq does `method: awq`"],
    ),
    "feedback that is no switch": (INT4 | {"error_feedback": "some"}, ["error_feedback: given 'some'", "boolean"]),
    "no divergence": (INT4 | {"max_divergence": 0}, ["max_divergence: given 0", "greater than 0"]),
    "divergence that is no number": (INT4 | {"max_divergence": float("nan")}, ["max_divergence: given nan"]),
}


def refused(command: str, folder: Path, source: Path, *stages: dict) -> str:
    message = refusal(command, write_recipe(folder, source, stages), "--output", folder / "out")
    assert not (folder / "out").exists()
    return message


@COMMANDS
@pytest.mark.parametrize("name", WRONG)
def test_options_that_cannot_be(command: str, name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stage, words = WRONG[name]
    message = refused(command, tmp_path, make_checkpoint("glm"), stage)
    assert_says(message, "recipe.yaml: 1 problem:", "stages.1.", *words)
    assert len(message.strip().splitlines()) == 2


@COMMANDS
@pytest.mark.skipif(find_spec("awq") is not None, reason="AutoAWQ is installed")
def test_autoawq_that_is_not_there(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    message = refused(command, tmp_path, make_checkpoint("glm"), INT4 | {"backend": "autoawq", "format": "awq"})
    assert_says(message, "stages.1.backend: autoawq is not installed", "pip install", "autoglm-compress[autoawq]")


@COMMANDS
def test_a_budget_that_is_too_small_names_the_least(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint("glm")
    least = plan(write_recipe(tmp_path, source, [INT4]))["checkpoints"][-1]["bytes"]
    message = refused(command, tmp_path, source, AUTO | {"budget": {"bytes": least - 1}})
    assert_says(message, "stages.1.budget: too small", f"4 bits everywhere the checkpoint has {least} bytes")
    planned = plan(write_recipe(tmp_path, source, [AUTO | {"budget": {"bytes": least}}]))["checkpoints"][-1]
    assert planned["bytes"] == least
    assert planned["shape"]["quantization"]["bits"] == 4


@COMMANDS
def test_a_quantized_head_needs_a_matrix_of_its_own(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    tied = make_checkpoint("llama", tie_word_embeddings=True)
    message = refused(command, tmp_path, tied, INT4 | {"head_bits": 8})
    assert_says(message, "stages.1.head_bits: 8", "embedding and head")
    untied = make_checkpoint("llama")
    message = refused(command, tmp_path, untied, {"stage": "tie"}, INT4 | {"head_bits": 8})
    assert_says(message, "stages.2.head_bits: 8", "embedding and head")


@COMMANDS
def test_outputs_that_awq_cannot_pack(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = make_checkpoint("llama", intermediate_size=100)
    message = refused(command, tmp_path, source, INT4 | {"format": "awq", "group_size": -1})
    assert_says(message, "stages.1.format: awq packs eight outputs into one integer", "mlp.gate_proj")


@COMMANDS
@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
def test_what_is_quantized_is_not_quantized_again(
    command: str, form: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    first = INT4 | {"format": form}
    message = refused(command, tmp_path, make_checkpoint("glm"), first, INT4 | {"name": "again"})
    assert_says(message, "stages.2", "quantized checkpoint of 'quantize'", "from:")
    quantized = compress(tmp_path / "first", make_checkpoint("glm"), first)
    message = refused(command, tmp_path, quantized, INT4)
    assert_says(message, quantized, "quantized already", "unquantized")


@pytest.mark.parametrize("stage", [INT4, INT4 | {"error_feedback": False}, INT4 | {"format": "awq"}, AUTO], ids=str)
def test_calibration_activations_that_are_not_finite(stage: dict, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    model = copytree(make_checkpoint("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].fill_(1e38)
    tensors["model.layers.2.mlp.gate_proj.weight"].fill_(1e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, model, [stage])
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "NaN or infinite", "overflows")
    assert not list((tmp_path / "out").glob("0*"))


@pytest.mark.parametrize(
    "options",
    [{"bits": 8, "head_bits": 8}, {"bits": 8, "symmetric": False}, {"format": "awq"}, AUTO | {"head_bits": 8}],
    ids=str,
)
def test_what_comes_out_is_evaluated(
    options: dict, make_checkpoint: MakeCheckpoint, tmp_path: Path, zero_points_load: None
):
    stages = [INT4 | options, {"stage": "evaluate", "tasks": ["perplexity"]}]
    run(write_recipe(tmp_path, make_checkpoint("llama"), stages))
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["stages"]
    assert rows[-1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.1)
    [folder] = stage_folders(tmp_path / "out")
    assert rows[1]["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_plan_says_what_the_bits_are(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stages = [INT4 | {"head_bits": 8}, AUTO | {"name": "auto", "from": "source"}]
    four, mixed = plan(write_recipe(tmp_path, make_checkpoint("llama"), stages))["checkpoints"][1:]
    found = four["shape"]["quantization"]
    assert (found["format"], found["symmetric"], found["bits"]) == ("compressed-tensors", True, [4, 8])
    assert (found["bits_by_linear"].pop("lm_head"), found["group_sizes"].pop("lm_head")) == (8, -1)
    assert set(found["bits_by_linear"].values()) == {4}
    assert set(found["group_sizes"].values()) == {32}
    assert [4, 8] in mixed["shape"]["quantization"]["bits_by_linear"].values()
    asymmetric = plan(write_recipe(tmp_path, make_checkpoint("llama"), [INT4 | {"format": "awq"}]))["checkpoints"][-1]
    found = asymmetric["shape"]["quantization"]
    assert (found["format"], found["symmetric"], found["bits"]) == ("awq", False, 4)
    if not transformers_loads(Scheme(4, 32, symmetric=False)):
        message = refusal("plan", write_recipe(tmp_path, make_checkpoint("llama"), [INT4 | {"symmetric": False}]))
        assert_says(message, "recipe.yaml", "symmetric", "zero points", "`format: awq`")


def test_a_plan_warns_where_error_feedback_has_too_few_tokens(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    few = {"source": "python-docs", "samples": 2, "sequence_length": 32}

    def warned(stage: dict) -> list[str]:
        return plan(write_recipe(tmp_path, make_checkpoint("llama"), [stage], calibration=few))["warnings"]

    [warning] = warned(INT4)
    assert_says(warning, "01-quantize", "64 calibration tokens are few for linears of 128 inputs", "samples to 4")
    assert not warned(INT4 | {"error_feedback": False})
    assert not warned(INT4 | {"method": "round_to_nearest"})
