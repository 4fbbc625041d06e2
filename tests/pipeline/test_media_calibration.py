"""Calibration with images and sounds: every stage reads such rows, and what the towers see decides what is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.text import documents
from autoglm_compress.checkpoint import Checkpoint
from support.command_line import assert_says, refusal
from support.media import draw, row, save_with_processor, write_rows
from support.multimodal import load, logits
from support.running import Kill, digests, invoke, run, run_until_killed, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)
STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "num_hidden_layers": 3},
    {"stage": "ffn", "intermediate_size": 96},
    {"stage": "width", "hidden_size": 32},
    {"stage": "refit", "layer_passes": 1, "logit_passes": 1},
    {"stage": "heal", "tokens": 1024, "batch_size": 4, "checks": 1, "cross_entropy": 0.5},
    {"stage": "quantize", "bits": 4, "group_size": 32, "max_divergence": 1e9},
]


@pytest.fixture(scope="module")
def omni(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_processor("qwen2_5omnithinker", tmp_path_factory.mktemp("omni"), tokenizer)


def calibrated(folder: Path, source: Path, rows: Path, stages: list[dict[str, Any]] = STAGES, **more: Any) -> Path:
    calibration = {"source": {"python-docs": 1, str(rows): 1}, "samples": 16, "sequence_length": 64}
    return write_recipe(folder, source, stages, calibration=calibration, **more)


@pytest.fixture(scope="module")
def output(omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run(calibrated(folder, omni, write_rows(folder, 40, sounds=True)))
    return folder / "out"


def test_every_stage_reads_images_and_sounds(omni: Path, output: Path, tmp_path: Path):
    chats = MediaChats(omni, Checkpoint(omni).family)
    rows = documents(write_rows(tmp_path, 12, sounds=True), "calibration")[:4]
    assert {kind for chat in rows for kind in chat.media} == {"image", "audio"}
    folders = stage_folders(output)
    assert len(folders) == len(STAGES)
    for folder in folders:
        model = load(folder)
        for chat in rows:
            assert logits(model, chats.inputs_of(chat)).isfinite().all()


def test_what_towers_write_to_a_turned_stream_is_what_they_wrote_before(output: Path):
    """So a refit finds next to no error where no neurons were cut. No image is among the rows that decide."""
    decided = json.loads((output / "04-refit" / "stage.json").read_text())["decisions"]
    assert decided["bridges"].keys() == {"audio_tower.proj"}
    assert decided["bridges"]["audio_tower.proj"]["error_before"] < 1e-4
    assert decided["unfitted_bridges"].keys() == {"visual.merger.mlp.2"}


def test_both_models_of_a_refit_see_the_same(omni: Path, tmp_path: Path):
    """What is not cut is found again: layers, heads and head have no error before anything is fitted."""
    same = {"stage": "depth", "num_hidden_layers": "1x"}
    refit = {"stage": "refit", "layer_passes": 1, "logit_passes": 1}
    run(calibrated(tmp_path, omni, write_rows(tmp_path, 40, sounds=True), [same, refit]))
    record = json.loads((tmp_path / "out" / "02-refit" / "stage.json").read_text())
    errors = [fit["error_before"] for layer in record["decisions"]["layers"] for fit in layer.values()]
    assert len(errors) == 4 * 7
    assert max(errors) < 1e-6


def test_what_the_towers_see_decides(omni: Path, tmp_path: Path):
    """With other images in the same places, other neurons are kept."""
    kept = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = write_rows(folder, 40)
        for number in range(40):
            draw(folder / f"{number}.png", 1000 * seed + number, (8, 8 + 4 * (number % 3)))
        run(calibrated(folder, omni, rows, [{"stage": "ffn", "intermediate_size": 96}]))
        kept.append(tensors_of(folder / "out" / "01-ffn"))
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0] if "mlp.gate_proj" in name)


def test_a_killed_run_goes_on_to_the_same_bytes(omni: Path, output: Path, tmp_path: Path):
    recipe = calibrated(tmp_path, omni, write_rows(tmp_path, 40, sounds=True))
    commit = "autoglm_compress.forward.hidden_states:HiddenStates.commit"
    assert run_until_killed(recipe, Kill(commit, call=12))
    run(recipe)
    assert digests(tmp_path / "out") == digests(output)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "path": "gone.png"}, ("rows.jsonl:1", "gone.png", "no file")),
        ({"type": "image", "path": "broken.png"}, ("rows.jsonl:1", "broken.png", "cannot read")),
        ({"type": "image", "url": "https://example.org/a.png"}, ("rows.jsonl:1", "downloaded", "file beside")),
        ({"type": "image", "path": "../outside.png"}, ("rows.jsonl:1", "outside.png", "not within")),
        ({"type": "image"}, ("rows.jsonl:1", "path")),
        ({"type": "audio", "path": "broken.png"}, ("rows.jsonl:1", "broken.png", "cannot read")),
        ({"type": "video", "path": "broken.png"}, ("rows.jsonl:1", "video", "Leave such rows")),
        ({"type": "image", "path": "huge.png"}, ("rows.jsonl:1", "sequence_length", "64")),
    ],
)
def test_bad_rows_are_said_before_work_starts(omni: Path, part: dict[str, str], words: tuple[str, ...], tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    draw(tmp_path / "outside.png", 0)
    draw(folder / "huge.png", 0, (32, 64))
    (folder / "rows.jsonl").write_text(json.dumps(row("What is it? ", part)) + "\n")
    recipe = calibrated(tmp_path, omni, folder / "rows.jsonl")
    for command in (("plan", recipe), ("run", recipe, "--output", tmp_path / "out")):
        assert_says(refusal(*command), *words)
    assert not list((tmp_path / "out").glob("[0-9]*"))


def test_a_model_without_ears_refuses_sounds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    model = save_with_processor("qwen2_5_vl", tmp_path / "model", tokenizer)
    recipe = calibrated(tmp_path, model, write_rows(tmp_path, 8, sounds=True), STAGES[:1])
    assert_says(refusal("plan", recipe), "rows.jsonl:2", "audio", "Qwen2_5_VLForConditionalGeneration")


def test_a_text_model_refuses_images(make_checkpoint: Any, tmp_path: Path):
    recipe = calibrated(tmp_path, make_checkpoint("glm"), write_rows(tmp_path, 4), STAGES[:1])
    assert_says(refusal("plan", recipe), "rows.jsonl:1", "image", "reads text alone")


def test_a_model_that_sees_and_gets_text_alone_is_warned_of(omni: Path, tmp_path: Path):
    recipe = calibrated(tmp_path, omni, write_rows(tmp_path, 8), STAGES[:1])
    assert_says(" ".join(invoke("plan", recipe).output.split()), "no row has an audio part")
    both = calibrated(tmp_path / "both", omni, write_rows(tmp_path, 8, sounds=True), STAGES[:1])
    assert "no row has" not in invoke("plan", both).output


def test_perplexity_asks_for_text(omni: Path, tmp_path: Path):
    rows = str(write_rows(tmp_path, 40))
    stages = [*STAGES[:1], {"stage": "evaluate", "tasks": ["perplexity"]}]
    calibration = {"source": rows, "samples": 4, "sequence_length": 64}
    recipe = write_recipe(tmp_path, omni, stages, calibration=calibration)
    assert_says(refusal("plan", recipe), "evaluation.perplexity.source", "rows.jsonl", "python-docs")


def test_a_teacher_does_not_go_on_with_images(omni: Path, tmp_path: Path):
    heal = {"stage": "heal", "tokens": 1024, "batch_size": 4, "data": "teacher_samples"}
    recipe = calibrated(tmp_path, omni, write_rows(tmp_path, 8), [heal])
    assert_says(refusal("plan", recipe), "calibration.source", "image", "teacher_samples", "data: calibration")
