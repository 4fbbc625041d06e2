"""Bridges of towers after a width cut: what was lost of images is fitted again, if other images say that it helps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.text import documents
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.stages.refit import Refit
from support.media import save_with_processor, write_rows
from support.multimodal import load
from support.running import Kill, digests, run, run_until_killed, tensors_of, write_recipe

torch.set_num_threads(1)
NARROW = {"stage": "width", "hidden_size": 32, "num_attention_heads": 2}
REFIT = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}
DOWN = "model.visual.merger.down_proj"
INNER = ("blocks.0.mlp.down_proj", "blocks.1.mlp.down_proj", "merger.gate_proj", "merger.up_proj")
"""What reads neurons of the tower."""


def calibrated(folder: Path, source: Path, texts: Any, *stages: dict[str, Any]) -> Path:
    calibration = {"source": texts, "samples": 16, "sequence_length": 64}
    return write_recipe(folder, source, list(stages), calibration=calibration)


def decisions(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())["decisions"]


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_processor("glm4v", tmp_path_factory.mktemp("glm4v"), tokenizer)


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run(calibrated(folder, source, str(write_rows(folder, 60)), NARROW, REFIT))
    return folder / "out"


@torch.no_grad()
def seen(model: torch.nn.Module, chats: MediaChats, rows: Path) -> torch.Tensor:
    """The features [tokens, hidden_size] of the images of rows that no stage has read."""
    inputs = [chats.inputs_of(chat) for chat in documents(rows, "held-out")]
    found = [model.model.get_image_features(each["pixel_values"], each["image_grid_thw"]) for each in inputs]
    return torch.cat([torch.cat(list(each.pooler_output)) for each in found])


def test_a_refit_brings_features_of_other_images_nearer_to_the_originals(source: Path, output: Path):
    rows, chats = output.parent / "rows.jsonl", MediaChats(source, Checkpoint(source).family)
    refitted = output / "02-refit"
    target = Lineage.load(refitted / "lineage.json").project(seen(load(source), chats, rows))
    cut, fitted = (
        float((seen(load(folder), chats, rows) - target).square().sum() / target.square().sum())
        for folder in (output / "01-width", refitted)
    )
    record = decisions(refitted)["bridges"]
    assert set(record) == {DOWN, *(f"model.visual.{name}" for name in INNER)}
    assert record[DOWN]["error_after"] < 0.9 * record[DOWN]["error_before"]
    assert fitted < 0.9 * cut
    before, after = tensors_of(output / "01-width"), tensors_of(refitted)
    vision = [name for name in before if name.startswith("model.visual.")]
    changed = {f"{module}.weight" for module, one in record.items() if one["strength"] is not None}
    assert {name for name in vision if not torch.equal(before[name], after[name])} == changed
    linears = json.loads((refitted / "stage.json").read_text())["linears"]
    assert [entry["error_after"] for entry in linears if entry["part"] == DOWN] == [record[DOWN]["error_after"]]


def test_the_errors_on_record_are_those_of_the_tower_that_is_written(source: Path, output: Path, tmp_path: Path):
    """A second refit, by the same rows, begins where the first has ended."""
    rows = output.parent / "rows.jsonl"
    run(calibrated(tmp_path, source, str(rows), NARROW, REFIT, REFIT | {"name": "again"}))
    first, second = (decisions(tmp_path / "out" / name)["bridges"][DOWN] for name in ("02-refit", "03-again"))
    assert second["error_before"] == pytest.approx(first["error_after"], rel=0.05)


def test_a_killed_refit_goes_on_to_the_same_bytes(source: Path, output: Path, tmp_path: Path):
    recipe = calibrated(tmp_path, source, str(write_rows(tmp_path, 60)), NARROW, REFIT)
    assert run_until_killed(recipe, Kill("autoglm_compress.fitting.bridges:write_json", call=1))
    run(recipe)
    assert digests(tmp_path / "out") == digests(output)


def test_text_alone_leaves_bridges_as_they_are_and_says_so(source: Path, tmp_path: Path):
    run(calibrated(tmp_path, source, "python-docs", NARROW, REFIT))
    found = decisions(tmp_path / "out" / "02-refit")
    assert "bridges" not in found
    assert found["unfitted_bridges"].keys() == {DOWN}
    before, after = (tensors_of(tmp_path / "out" / folder) for folder in ("01-width", "02-refit"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model.visual."))


def test_towers_of_full_width_are_not_fitted(source: Path, output: Path, tmp_path: Path):
    same = {"stage": "depth", "num_hidden_layers": "1x"}
    run(calibrated(tmp_path, source, str(output.parent / "rows.jsonl"), same, REFIT))
    assert not {"bridges", "unfitted_bridges"} & decisions(tmp_path / "out" / "02-refit").keys()
    before, after = tensors_of(source), tensors_of(tmp_path / "out" / "02-refit")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model.visual."))


def test_neurons_of_the_tower_are_chosen_by_what_they_do_to_images(source: Path, output: Path):
    """The neurons that are left add more to the outputs of their readers, on the calibration rows, than all others."""
    chats = MediaChats(source, Checkpoint(source).family)
    model, sums = load(source), {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        added = inputs[0].flatten(0, -2)[:, None] * module.weight  # [tokens, outputs, neurons]
        sums[module] = sums.get(module, 0) + added.double().square().sum((0, 1))

    blocks = {f"model.visual.blocks.{n}.mlp": block.mlp.down_proj for n, block in enumerate(model.model.visual.blocks)}
    for down in blocks.values():
        down.register_forward_hook(note)
    rows = documents(output.parent / "rows.jsonl", "calibration")
    for chat in rows:
        inputs = chats.inputs_of(chat)
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    kept = decisions(output / "01-width")["kept_tower_neurons"]
    agree = [len(set(kept[name]) & set(sums[down].topk(32).indices.tolist())) for name, down in blocks.items()]
    assert min(agree) >= 30  # the stage reads a part of the rows


def test_plan_counts_the_towers_and_the_sums_over_what_they_see(source: Path):
    """With more tokens than inputs: their products with themselves and with targets, to fit to and to decide."""
    checkpoint = Checkpoint(source)
    before, after = checkpoint.shape, checkpoint.shape.with_width(32)
    inputs, refit = checkpoint.infos[f"{DOWN}.weight"].shape[1], Refit(stage="refit")
    few, many = (
        refit.seeing_memory(after, before, CalibrationOptions(samples=8, sequence_length=length)) for length in (8, 512)
    )
    assert few >= sum(4 * tower.parameters + tower.bytes for tower in before.kept)
    assert many > max(few, 2 * 4 * inputs * (inputs + 32))
