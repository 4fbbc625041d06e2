"""Exports to GGUF through recipes: what is in the files, and what llama.cpp makes of it, for every family."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autoglm_compress.checkpoint import Checkpoint
from support.command_line import assert_says, plan, refusal
from support.exporting import (
    COMMON_SHAPES,
    QUANTIZED,
    exact_weight,
    export,
    in_engine_order,
    metadata,
    quantize,
    recipe_of,
    record,
    run_stages,
    stage_folder,
    stored,
)
from support.models import FAMILIES
from support.running import digests, run

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
TYPES = {"int4": "Q4_0", "int8": "Q8_0", "zeros": "Q4_1", "awq": "Q4_1", "source": "F16"}
SWAPS = {"llama", "mistral", "qwen2"}
"""Families whose q/k rows change places; qwen2 because the models here are wider inside their heads than outside."""
NAMES = {
    "blk.1.attn_q": "self_attn.q_proj",
    "blk.1.attn_k": "self_attn.k_proj",
    "blk.1.attn_v": "self_attn.v_proj",
    "blk.1.attn_output": "self_attn.o_proj",
    "blk.1.ffn_down": "mlp.down_proj",
}
Make = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_kind_of_weights_is_exact_and_proven(family: str, make_checkpoint: Make, tmp_path: Path):
    source = make_checkpoint(family)
    stages = [quantize(name) for name in QUANTIZED] + [export(name) for name in [*QUANTIZED, "source"]]
    run_stages(tmp_path, source, *stages)
    for name, kind in TYPES.items():
        folder = stage_folder(tmp_path / "out", f"{name}-gguf")
        checkpoint = Checkpoint(source if name == "source" else stage_folder(tmp_path / "out", name))
        tensors = stored(folder)
        for engine, ours in NAMES.items():
            module = f"model.layers.1.{ours}"
            found, values = tensors[f"{engine}.weight"]
            assert found == kind
            exact = (
                checkpoint.read(f"{module}.weight").double() if name == "source" else exact_weight(checkpoint, module)
            )
            if engine.endswith(("_q", "_k")) and family in SWAPS:
                exact = in_engine_order(exact, checkpoint.shape.head_dim)
            if name == "source":
                exact = exact.half().double()
            assert np.array_equal(values.astype(np.float64), exact.float().double().numpy())
        decided = record(folder)
        assert decided["verified"] is True
        assert decided["proof"]["kl_divergence"] < (1e-5 if name == "source" else 1e-3)
        assert decided["proof"]["same_greedy_token"] > 0.8
        assert decided["rounded"]["largest_relative_error"] < 1e-3
        assert decided["bytes"] == (folder / decided["file"]).stat().st_size


SHAPES = COMMON_SHAPES | {
    "qwen2 as wide inside": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_what_sets_models_apart_reaches_the_engine(case: str, make_checkpoint: Make, tmp_path: Path):
    """In 16 bits, where the proof is sharp."""
    family, changes = SHAPES[case]
    source = make_checkpoint(family, **changes)
    run_stages(tmp_path, source, export("source"))
    decided = record(stage_folder(tmp_path / "out", "source-gguf"))
    assert decided["proof"]["kl_divergence"] < 1e-5
    assert ("output.weight" in stored(stage_folder(tmp_path / "out", "source-gguf"))) == (case != "tied")


def test_bits_that_differ_between_linears_are_kept_apart(make_checkpoint: Make, tmp_path: Path):
    auto = quantize("auto", bits="auto", budget={"average_bits": 6}, group_size=32, method="round_to_nearest")
    run_stages(tmp_path, make_checkpoint("glm"), auto, export("auto"))
    types = {kind for name, (kind, _) in stored(stage_folder(tmp_path / "out", "auto-gguf")).items() if "blk" in name}
    assert types == {"F32", "Q4_0", "Q8_0"}


def test_eight_bits_for_the_ends_are_a_third_of_their_bytes_and_their_cost_is_told(
    make_checkpoint: Make, tmp_path: Path
):
    small = export("int4", name="small", embedding_bits=8)
    output = run_stages(tmp_path, make_checkpoint("glm"), quantize("int4"), export("int4"), small)
    whole, rounded = (record(stage_folder(tmp_path / "out", name)) for name in ("int4-gguf", "small"))
    tensors = stored(stage_folder(tmp_path / "out", "small"))
    assert {tensors[name][0] for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}
    assert rounded["bytes"] < whole["bytes"] - 2 * 512 * 64 * 0.9
    assert 0 < rounded["embedding_bits"]["kl_divergence"] < rounded["proof"]["kl_divergence"] < 5e-3
    assert "embedding and head in 8 bits cost a KL divergence of" in output


def test_a_quantized_head_keeps_its_integers(make_checkpoint: Make, tmp_path: Path):
    run_stages(tmp_path, make_checkpoint("glm"), quantize("head", bits=8, group_size=32, head_bits=8), export("head"))
    kind, values = stored(stage_folder(tmp_path / "out", "head-gguf"))["output.weight"]
    checkpoint = Checkpoint(stage_folder(tmp_path / "out", "head"))
    assert kind == "Q8_0"
    assert np.array_equal(values, exact_weight(checkpoint, "lm_head").float().numpy())


def test_a_window_that_the_engine_lacks_is_the_context(make_checkpoint: Make, tmp_path: Path):
    output = run_stages(tmp_path, make_checkpoint("mistral"), export("source"))
    folder = stage_folder(tmp_path / "out", "source-gguf")
    assert metadata(folder)["llama.context_length"] == 8
    assert "llama.cpp has no sliding window for this family: the context of the file is the window of 8" in output
    assert record(folder)["proof"]["tokens"] == 4 * 8


def test_the_folder_is_one_that_a_person_can_use(make_checkpoint: Make, tmp_path: Path):
    source = make_checkpoint("glm")
    evaluation = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
    run_stages(tmp_path, source, quantize("int4"), export("int4", called="tiny"), evaluation=evaluation)
    folder = stage_folder(tmp_path / "out", "int4-gguf")
    assert {path.name for path in folder.iterdir()} - {"plot.svg"} == {
        "tiny-Q4_0.gguf",
        "README.md",
        "Modelfile",
        "SHA256SUMS",
        "stage.json",
    }
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stderr
    assert "tiny-Q4_0.gguf: OK" in sums.stdout
    card = (folder / "README.md").read_text()
    assert_says(card, "tags:\n- gguf", "llama-cli -m tiny-Q4_0.gguf", "pkg install", "ollama create", "Perplexity of")
    assert_says(card, "KL divergence", "stage: quantize", "0 of 5632 scales")
    assert (folder / "Modelfile").read_text() == "FROM ./tiny-Q4_0.gguf\n"
    row = json.loads((tmp_path / "out/metrics.json").read_text())["stages"][-1]
    assert row["bytes"] == sum(
        path.stat().st_size for path in folder.iterdir() if path.name not in ("stage.json", "plot.svg")
    )


def test_a_finished_export_is_kept_and_its_disk_is_planned(make_checkpoint: Make, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), quantize("int4"), export("int4"))
    planned = plan(recipe)["checkpoints"][-1]
    run(recipe)
    folder = stage_folder(tmp_path / "out", "int4-gguf")
    assert 0 <= planned["disk_bytes"] - next(folder.glob("*.gguf")).stat().st_size < 64_000
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
    ],
)
def test_a_config_that_the_engine_lacks_is_refused_before_work(
    family: str, changes: dict, words: list[str], make_checkpoint: Make, tmp_path: Path
):
    recipe = recipe_of(tmp_path, make_checkpoint(family, **changes), export("source"))
    assert_says(refusal("plan", recipe), *words)
    assert_says(refusal("run", recipe, "--output", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_engine_lacks_are_refused_with_the_line(make_checkpoint: Make, tmp_path: Path):
    recipe = recipe_of(tmp_path, make_checkpoint("qwen3", attention_bias=True), export("source"))
    assert_says(refusal("plan", recipe), "stages.1.format", "attention_bias: llama.cpp's qwen3 has no tensors for it")


def test_groups_that_no_block_holds_are_refused_with_the_line(make_checkpoint: Make, tmp_path: Path):
    zeros = quantize("int8z", bits=8, group_size=32, symmetric=False)
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), zeros, export("int8z"))
    assert_says(refusal("plan", recipe), "stages.2.format", "q_proj.weight: INT8 with zero points", "recipe.yaml")
    odd = make_checkpoint("glm", hidden_size=48)
    message = refusal("plan", recipe_of(tmp_path, odd, export("source", embedding_bits=8)))
    assert_says(message, "stages.1.embedding_bits", "48 inputs do not divide by 32")
