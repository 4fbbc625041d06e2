"""Exports to ONNX through recipes: what is in the files, and what ONNX Runtime makes of it, for every family."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoglm_compress.checkpoint import Checkpoint
from support.command_line import assert_says, plan, refusal
from support.exporting import COMMON_SHAPES, export, quantize, recipe_of, record, run_stages, stage_folder
from support.models import FAMILIES
from support.onnx_files import exact_weight, initializers, node_types, product, read_product
from support.running import digests, run

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
Make = Callable[..., Path]
KINDS = ("int4", "int8", "awq")


def onnx(checkpoint: str, **options: Any) -> dict[str, Any]:
    """A stage that exports to ONNX, called after the checkpoint it takes."""
    return export(checkpoint, **({"name": f"{checkpoint}-onnx", "format": "onnx"} | options))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_kind_of_weights_is_exact_and_proven(family: str, make_checkpoint: Make, tmp_path: Path):
    source = make_checkpoint(family)
    stages = [quantize(name) for name in KINDS]
    stages += [onnx(name, accuracy_level=0) for name in [*KINDS, "source"]] + [onnx("int4", name="fast")]
    run_stages(tmp_path, source, *stages)
    for name in [*KINDS, "source"]:
        folder = stage_folder(tmp_path / "out", f"{name}-onnx")
        checkpoint = Checkpoint(source if name == "source" else stage_folder(tmp_path / "out", name))
        for layer in (0, 3):
            for node, modules in products(checkpoint, layer).items():
                exact = torch.cat([exact_weight(checkpoint, f"model.layers.{layer}.{module}") for module in modules])
                if node.endswith(("gate_proj", "up_proj")) and "mlp.gate_up_proj" in modules:
                    exact = exact.chunk(2)[node.endswith("up_proj")]
                assert torch.equal(read_product(folder, f"/model/layers.{layer}/{node}/MatMul"), exact), node
        decided = record(folder)
        assert decided["verified"] is True
        assert decided["proof"]["kl_divergence"] < 1e-6
        assert decided["proof"]["same_greedy_token"] == 1
        assert decided["rounded"]["largest_relative_error"] == 0
        assert decided["bytes"] == sum((folder / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
        assert ("notes" in decided) == (family == "qwen2")  # whose tokenizer splits blanks by \\s*[\\r\\n]+
    fast = record(stage_folder(tmp_path / "out", "fast"))
    assert fast["accuracy_level"] == 4
    assert 1e-6 < fast["proof"]["kl_divergence"] < 5e-3


def products(checkpoint: Checkpoint, layer: int) -> dict[str, list[str]]:
    """The linears whose rows a product of the graph has, by its name."""
    found = {
        "attn/qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn/o_proj": ["self_attn.o_proj"],
        "mlp/down_proj": ["mlp.down_proj"],
    }
    for part in ("gate_proj", "up_proj"):
        fused = checkpoint.family.roles.ffn.gate_up
        found[f"mlp/{part}"] = [fused or f"mlp.{part}"]
    return found


SHAPES = COMMON_SHAPES | {
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "a matrix as wide as the vocabulary": ("llama", {"intermediate_size": 512}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_what_sets_models_apart_reaches_the_engine(case: str, make_checkpoint: Make, tmp_path: Path):
    family, changes = SHAPES[case]
    run_stages(tmp_path, make_checkpoint(family, **changes), onnx("source"))
    folder = stage_folder(tmp_path / "out", "source-onnx")
    assert record(folder)["proof"]["kl_divergence"] < 1e-9
    wide = [size for size in (value.shape for value in initializers(folder).values()) if 512 in size and 64 in size]
    assert len(wide) == {"tied": 1, "a matrix as wide as the vocabulary": 2 + 4 * 3}.get(case, 2)


def test_bits_that_differ_between_linears_are_kept_apart(make_checkpoint: Make, tmp_path: Path):
    auto = quantize("auto", bits="auto", budget={"average_bits": 6}, group_size=32, method="round_to_nearest")
    run_stages(tmp_path, make_checkpoint("glm"), auto, onnx("auto", accuracy_level=0))
    folder = stage_folder(tmp_path / "out", "auto-onnx")
    assert record(folder)["proof"]["kl_divergence"] < 1e-6
    assert {"INT4", "INT8"} < record(folder)["bytes_by_type"].keys()
    schemes = Checkpoint(stage_folder(tmp_path / "out", "auto")).shape.quantization.schemes
    names = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    for layer in range(4):
        bits = {schemes[f"model.layers.{layer}.{name}"].bits for name in names[0]}
        packed = product(folder, f"/model/layers.{layer}/attn/qkv_proj/MatMul") is not None
        assert packed == (len(bits) == 1)


@pytest.mark.parametrize("tied", [False, True])
def test_eight_bits_for_the_ends_halve_their_bytes_and_their_cost_is_told(
    tied: bool, make_checkpoint: Make, tmp_path: Path
):
    small = onnx("int4", name="small", embedding_bits=8, accuracy_level=0)
    source = make_checkpoint("llama", tie_word_embeddings=tied)
    output = run_stages(tmp_path, source, quantize("int4"), onnx("int4", accuracy_level=0), small)
    whole, rounded = (record(stage_folder(tmp_path / "out", name)) for name in ("int4-onnx", "small"))
    ends = 512 * 64 * (1 if tied else 2)
    assert abs(whole["bytes"] - rounded["bytes"] - ends * (2 - 1 - 4 / 32)) < 2000
    cost = rounded["embedding_bits"]["kl_divergence"]
    assert 0 < cost < 5e-3
    assert rounded["proof"]["kl_divergence"] == pytest.approx(cost, rel=0.5)
    assert "embedding and head in 8 bits cost a KL divergence of" in output
    assert "GatherBlockQuantized" in node_types(stage_folder(tmp_path / "out", "small"))


def test_a_quantized_head_keeps_its_integers(make_checkpoint: Make, tmp_path: Path):
    stages = quantize("head", bits=8, group_size=32, head_bits=8), onnx("head", accuracy_level=0)
    run_stages(tmp_path, make_checkpoint("glm"), *stages)
    checkpoint = Checkpoint(stage_folder(tmp_path / "out", "head"))
    found = read_product(stage_folder(tmp_path / "out", "head-onnx"), "/lm_head/MatMul")
    assert torch.equal(found, exact_weight(checkpoint, "lm_head"))


def test_the_folder_is_one_that_a_person_can_use(make_checkpoint: Make, tmp_path: Path):
    run_stages(tmp_path, make_checkpoint("glm"), quantize("int4"), onnx("int4", called="tiny"))
    folder = stage_folder(tmp_path / "out", "int4-onnx")
    names = {path.name for path in folder.iterdir()} - {"plot.svg"}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "README.md", "SHA256SUMS"} < names
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stderr
    assert_says(sums.stdout, "model.onnx.data: OK", "genai_config.json: OK")
    card = (folder / "README.md").read_text()
    assert_says(
        card, "tags:\n- onnx", "onnxruntime-genai-android", "og.Model", "all exactly the checkpoint's", "# tiny"
    )
    settings = json.loads((folder / "genai_config.json").read_text())
    assert settings["model"]["type"] == "chatglm"
    assert settings["search"]["max_length"] == 4096
    code = card.split("```python\n")[1].split("```")[0].replace('og.Model(".")', "og.Model(FOLDER)")
    script = f"FOLDER = {str(folder)!r}\n{code.replace('256', '12')}"
    said = subprocess.run([__import__("sys").executable, "-c", script], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def test_a_finished_export_is_kept_and_its_disk_is_planned(make_checkpoint: Make, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), quantize("int4"), onnx("int4"))
    planned = plan(recipe)["checkpoints"][-1]
    run(recipe)
    folder = stage_folder(tmp_path / "out", "int4-onnx")
    written = sum(path.stat().st_size for path in folder.iterdir() if path.name not in ("stage.json", "plot.svg"))
    assert 0 <= planned["disk_bytes"] - written < 300_000
    before = digests(tmp_path / "out")
    assert run(recipe).count("finished before, reused") == 2
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, ["config.json", "hidden_act gelu", "silu"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope_type dynamic"],
        ),
        ("llama", {"head_dim": 8}, ["stages.1.format", "head_dim 8", "multiple of 16"]),
    ],
)
def test_a_model_that_the_engine_lacks_is_refused_before_work(
    family: str, changes: dict, words: list[str], make_checkpoint: Make, tmp_path: Path
):
    recipe = recipe_of(tmp_path, make_checkpoint(family, **changes), onnx("source"))
    assert_says(refusal("plan", recipe), *words)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_groups_that_no_kernel_has_are_refused_with_the_line(make_checkpoint: Make, tmp_path: Path):
    odd = make_checkpoint("glm", hidden_size=48)
    message = refusal("plan", recipe_of(tmp_path, odd, onnx("source", embedding_bits=8)))
    assert_says(message, "stages.1.embedding_bits", "48 inputs do not divide by 32")
    whole_rows = quantize("rows", bits=4, group_size=-1)
    narrow = make_checkpoint("llama", intermediate_size=120)
    message = refusal("plan", recipe_of(tmp_path, narrow, whole_rows, onnx("rows")))
    assert_says(message, "stages.2.format", "down_proj.weight: groups of 120 inputs", "recipe.yaml")
    message = refusal("plan", recipe_of(tmp_path, odd, export("source", accuracy_level=4)))
    assert_says(message, "stages.1.accuracy_level", "only format: onnx has it")


def test_memory_is_told_and_limited(make_checkpoint: Make, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), onnx("source"))
    assert_says(refusal("run", recipe, "--output", tmp_path / "out", "--memory-limit", "1MB"), "--memory-limit")
    assert np.isfinite(plan(recipe)["checkpoints"][-1]["disk_bytes"])
