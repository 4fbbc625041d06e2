"""One adapter for images and sounds: what is written, what later stages make of it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from support.command_line import assert_says, plan, refusal
from support.media import save_omni, save_with_processor, write_rows
from support.multimodal import load, logits
from support.running import Kill, digests, invoke, run, run_until_killed, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)
LINEARS = ("visual.merger.mlp.2", "audio_tower.proj")
INPUTS, WIDTH = 128, 64
SHARE = {"stage": "share_adapter", "passes": 2}
STAGES: list[dict[str, Any]] = [
    {"stage": "ffn", "intermediate_size": 96},
    SHARE,
    {"stage": "width", "hidden_size": 32},
    {"stage": "refit", "layer_passes": 0, "logit_passes": 0},
    {
        "stage": "quantize",
        "name": "both",
        "bits": 8,
        "group_size": 32,
        "method": "round_to_nearest",
        "max_divergence": 1e9,
        "towers": {"adapter": {"bits": 8}, "audio": {"bits": 8}},
    },
    {
        "stage": "quantize",
        "name": "one",
        "from": "refit",
        "bits": 8,
        "group_size": 32,
        "method": "round_to_nearest",
        "max_divergence": 1e9,
        "towers": {"audio": {"bits": 8}},
    },
]


@pytest.fixture(scope="module")
def omni(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_omni(tmp_path_factory.mktemp("omni"), tokenizer)


def recipe(folder: Path, source: Path, rows: Path | str, stages: list[dict[str, Any]], **more: Any) -> Path:
    calibration = {"source": str(rows), "samples": 16, "sequence_length": 64} | more
    return write_recipe(folder, source, stages, calibration=calibration)


@pytest.fixture(scope="module")
def output(omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run(recipe(folder, omni, write_rows(folder, 60, sounds=True), STAGES))
    return folder / "out"


def stage_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


def linears_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of both linears, by their names relative to them."""
    tensors = tensors_of(folder)
    return [
        {name.removeprefix(linear): tensor for name, tensor in tensors.items() if name.startswith(f"{linear}.")}
        for linear in LINEARS
    ]


def equal(folder: Path) -> bool:
    first, second = linears_of(folder)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_both_places_stay_equal_through_later_stages(output: Path):
    first, *shared, ended = stage_folders(output)
    assert not equal(first)
    for folder in shared:
        assert equal(folder)
        assert json.loads((folder / "config.json").read_text())["shared_adapter"] is True
        assert stage_record(folder)["shape"]["shared_adapter"] is True
    assert not equal(ended)
    assert "shared_adapter" not in json.loads((ended / "config.json").read_text())
    assert "shared_adapter" not in stage_record(ended)["shape"]
    assert_says(" ".join(stage_record(ended)["warnings"]), "shared adapter", "adapter, audio")


def test_plain_transformers_loads_what_is_written(output: Path):
    """And nothing but the towers has changed."""
    given, folder, *_ = stage_folders(output)
    tokens = torch.arange(20)[None] + 30
    assert torch.equal(logits(load(folder), {"input_ids": tokens}), logits(load(given), {"input_ids": tokens}))
    before, after = tensors_of(given), tensors_of(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    shared = {f"{linear}.{part}" for linear in LINEARS for part in ("weight", "bias")}
    assert shared <= changed
    before_it = ("visual.merger.mlp.0.", "audio_tower.layers.1.", "audio_tower.ln_post.")
    assert all(name.startswith(before_it) for name in changed - shared)
    assert bool(changed - shared) is stage_record(folder)["decisions"]["trained"]


def test_what_is_on_record(output: Path):
    found = stage_record(output / "02-share_adapter")["decisions"]
    errors, divergence = found["errors"], found["held_out_divergence"]
    for kind in ("image", "audio"):
        assert errors["closed_form"][kind] > 0
        assert errors["trained"][kind] > 0
    assert sum(errors["closed_form"].values()) < sum(errors["average"].values())
    assert 0 < divergence["chosen"] < divergence["average"]
    deciding = found["deciding_divergence"]
    better = found["loss_after"] < 0.9999 * found["loss_before"] and deciding["trained"] < deciding["closed_form"]
    assert found["trained"] is better
    assert bool(stage_record(output / "02-share_adapter")["warnings"]) is not better
    assert found["parameters_saved"] == (INPUTS + 1) * WIDTH


def test_the_adapter_counts_once_in_a_column_of_its_own(omni: Path, output: Path):
    rows = json.loads((output / "metrics.json").read_text())["stages"]
    saved = [row["parameters"] - row["unique_parameters"] for row in rows]
    assert saved == [0, 0, (INPUTS + 1) * WIDTH, *[(INPUTS + 1) * WIDTH // 2] * 3, 0]
    inspected = json.loads(invoke("inspect", output / "02-share_adapter", "--json").output)
    assert inspected["parameters"] - inspected["unique_parameters"] == (INPUTS + 1) * WIDTH
    assert_says(invoke("inspect", output / "02-share_adapter").output, "shared adapter once", "shared_adapter")
    assert "shared" not in invoke("inspect", omni).output
    assert_says((output / "report.html").read_text(), "a shared adapter counted once")


def test_a_killed_stage_goes_on_to_the_same_bytes(omni: Path, output: Path, tmp_path: Path):
    """The run that goes on reads chats in another order, as nothing is measured again."""
    file = recipe(tmp_path, omni, write_rows(tmp_path, 60, sounds=True), STAGES[:2])
    assert run_until_killed(file, Kill("autoglm_compress.fitting.adapter_descent:SharedTowers.fit", call=1))
    assert list((tmp_path / "out").glob(".work/**/inputs/*.safetensors"))
    run(file)
    assert digests(tmp_path / "out" / "02-share_adapter") == digests(output / "02-share_adapter")


def test_what_cannot_be_shared_is_refused_by_plan(tokenizer: PreTrainedTokenizerFast, omni: Path, tmp_path: Path):
    rows = write_rows(tmp_path, 8, sounds=True)
    both = "Qwen2_5OmniThinkerForConditionalGeneration"
    sees = save_with_processor("qwen2_5_vl", tmp_path / "sees", tokenizer)
    assert_says(refusal("plan", recipe(tmp_path, sees, rows, [SHARE])), "does not both see and hear", both)
    unequal = save_with_processor("qwen2_5omnithinker", tmp_path / "unequal", tokenizer)
    message = refusal("plan", recipe(tmp_path, unequal, rows, [SHARE]))
    assert_says(message, "unequal sizes", f"{LINEARS[0]} bias 64 and weight 64 x 128", "weight 64 x 32")
    twice = refusal("plan", recipe(tmp_path, omni, rows, [SHARE, SHARE | {"name": "again"}]))
    assert_says(twice, "stages.2", "shared already")
    assert_says(refusal("plan", recipe(tmp_path, omni, "python-docs", [SHARE])), "no row has an image or an audio part")
    images = write_rows(tmp_path / "sees", 8)
    assert_says(refusal("plan", recipe(tmp_path, omni, images, [SHARE])), "no row has an audio part", "share_adapter")


def test_a_plan_counts_the_adapter_once(omni: Path, tmp_path: Path):
    file = recipe(tmp_path, omni, write_rows(tmp_path, 20, sounds=True), [SHARE])
    before, after = plan(file)["checkpoints"]
    assert before["unique_parameters"] == before["parameters"] == after["parameters"]
    assert after["unique_parameters"] == after["parameters"] - (INPUTS + 1) * WIDTH
    assert "unique" in invoke("plan", file).output
