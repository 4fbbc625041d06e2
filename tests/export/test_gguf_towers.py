"""Exports to GGUF of models with towers beside the text, as llama.cpp runs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export import vision_writer
from autoglm_compress.export.exactness import Exactness
from support import image_rows
from support.command_line import assert_says, plan, refusal
from support.exporting import (
    exact_weight,
    export,
    metadata,
    quantize,
    recipe_of,
    record,
    run_stages,
    stage_folder,
    stored,
)
from support.multimodal import FAMILIES, MEDIA_TOKEN, load, logits, save

torch.set_num_threads(1)
ENGINE = {
    "glm4v": "glm4",
    "glm46v": "glm4",
    "qwen2_5_vl": "paddleocr",
    "qwen3vl": "qwen3vl",
    "qwen2_5omnithinker": "qwen2",
    "qwen2audio": "qwen2",
    "glmasr": "llama",
    "voxtral": "llama",
}
SECTIONS = {"glm4": [2, 3, 3, 0], "paddleocr": [2, 3, 3, 0], "qwen3vl": [3, 3, 2, 0]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_tower_is_exact_and_proven_and_what_stays_behind_is_said(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save(name, tmp_path / "source", tokenizer)
    output = run_stages(tmp_path, source, quantize("int4"), export("int4"), export("source"))
    towers = ", ".join(Checkpoint(source).family.kept)
    assert_says(output, f"the file is the text tower alone, which reads text: {towers} stay behind: ")
    for checkpoint in ("int4", "source"):
        folder = stage_folder(tmp_path / "out", f"{checkpoint}-gguf")
        decided = record(folder)
        assert decided["verified"] is True
        assert decided["proof"]["kl_divergence"] < (1e-5 if checkpoint == "source" else 1e-3)
        assert towers in (folder / "README.md").read_text()
    told = metadata(stage_folder(tmp_path / "out", "int4-gguf"))
    assert told["general.architecture"] == ENGINE[name]
    assert told.get(f"{ENGINE[name]}.rope.dimension_sections") == SECTIONS.get(ENGINE[name])
    checkpoint = Checkpoint(stage_folder(tmp_path / "out", "int4"))
    kind, values = stored(stage_folder(tmp_path / "out", "int4-gguf"))["blk.1.ffn_down.weight"]
    exact = exact_weight(checkpoint, f"{checkpoint.family.layer_prefix(1)}mlp.down_proj")
    assert kind == "Q4_0"
    assert np.array_equal(values, exact.float().numpy())


SEEING = {
    "glm4v": "Glm4vImageProcessor",
    "glm46v": "Glm46VImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "qwen3vl": "Qwen2VLImageProcessor",
}
WINDOWS = {"window_size": 112, "patch_size": 14}
"""Of the towers that llama.cpp runs: four tokens on each side."""


def save_seeing(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model with the file that says what is done to pixels."""
    processor = {"image_processor_type": SEEING[name], "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    vision = FAMILIES[name].settings["vision_config"]
    save(name, folder, tokenizer, vision_config=vision | (WINDOWS if "window_size" in vision else {}))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("name", SEEING)
def test_the_vision_tower_goes_along_where_the_engine_sees_what_the_checkpoint_does(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save_seeing(name, tmp_path / "source", tokenizer)
    narrow = {"stage": "width", "hidden_size": 32}
    if Checkpoint(source).family.transformers_derives_head_dim:
        narrow["num_attention_heads"] = 2
    stages = [narrow, quantize("int4", **{"from": "width"}), export("int4", called="tiny"), export("source")]
    recipe = recipe_of(tmp_path, source, *stages)
    planned = plan(recipe)["checkpoints"]
    output = run_stages(tmp_path, source, *stages)
    assert "stay behind" not in output
    for checkpoint, entry in zip(("int4", "source"), planned[-2:], strict=True):
        folder = stage_folder(tmp_path / "out", f"{checkpoint}-gguf")
        found = record(folder)
        assert found["vision_proof"]["squared_error"] < 1e-5
        assert found["vision_proof"]["tokens"] == 64
        vision = folder / found["vision_file"]
        assert found["bytes"] == vision.stat().st_size + (folder / found["file"]).stat().st_size
        assert 0 <= entry["disk_bytes"] - found["bytes"] < 64_000
        assert_says((folder / "README.md").read_text(), f"--mmproj {vision.name}", "features within a squared error")
        assert vision.name in (folder / "SHA256SUMS").read_text()
    assert vision.name == "mmproj-source-F16.gguf"
    assert (tmp_path / "out" / "03-int4-gguf" / "mmproj-tiny-F16.gguf").exists()


def test_a_vision_file_that_is_wrong_is_refused_and_not_published(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = save_seeing("glm4v", tmp_path / "source", tokenizer)
    values = vision_writer._values

    def swapped(checkpoint: Checkpoint, tensor: vision_writer.VisionTensor, exactness: Exactness) -> np.ndarray:
        found = values(checkpoint, tensor, exactness)
        return found[::-1].copy() if tensor.engine_name == "mm.up.weight" else found

    monkeypatch.setattr(vision_writer, "_values", swapped)
    recipe = recipe_of(tmp_path, source, export("source"))
    message = " ".join(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu").split())
    assert_says(message, "mmproj-source-F16.gguf: llama.cpp does not see by it what the checkpoint sees", "not kept")
    assert list((tmp_path / "out").rglob("*.gguf")) == []


def test_a_tower_with_other_windows_stays_behind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save_seeing("qwen2_5_vl", tmp_path / "source", tokenizer)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["window_size"] = 56
    (source / "config.json").write_text(json.dumps(config))
    output = run_stages(tmp_path, source, export("source"))
    assert_says(output, "vision, adapter stay behind: llama.cpp has windows of 112 pixels", "window_size is 56")


def test_a_tower_in_eight_bits_stays_behind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save_seeing("glm4v", tmp_path / "source", tokenizer)
    rounded = quantize("int8", towers={"vision": {"bits": 8}})
    output = run_stages(tmp_path, source, rounded, export("int8"))
    assert_says(output, "vision, adapter stay behind: their linears are in 8 bits")
    assert len(list((tmp_path / "out" / "02-int8-gguf").glob("*.gguf"))) == 1


@pytest.mark.parametrize("name", SEEING)
def test_after_an_image_the_engine_predicts_what_the_whole_model_does(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save_seeing(name, tmp_path / "source", tokenizer)
    run_stages(tmp_path, source, export("source"))
    folder = stage_folder(tmp_path / "out", "source-gguf")
    decided = record(folder)
    size = Checkpoint(source).whole_config.vision_config.patch_size
    image = np.random.default_rng(1).integers(0, 256, (12 * size, 20 * size, 3), dtype=np.uint8)  # 6 x 10 tokens
    np.save(tmp_path / "pixels.npy", image)
    job = {
        "file": str(folder / decided["file"]),
        "vision": str(folder / decided["vision_file"]),
        "pixels": str(tmp_path / "pixels.npy"),
        "logits": str(tmp_path / "logits.npy"),
        "text": "What is on the image <__media__> of the word and the other words?",
    }
    engine = subprocess.run(
        [sys.executable, image_rows.__file__], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    chunks = json.loads(engine.stdout)
    assert 60 in chunks
    tokens = [token for chunk in chunks for token in ([MEDIA_TOKEN] * chunk if isinstance(chunk, int) else chunk)]
    tokens = torch.tensor([tokens])
    mean, std = (torch.tensor(values) for values in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25]))
    patches = (torch.from_numpy(image) / 255 - mean) / std
    patches = patches.view(6, 2, size, 10, 2, size, 3).permute(0, 3, 1, 4, 6, 2, 5).reshape(240, 3, 1, size**2)
    row = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == MEDIA_TOKEN).int(),
        "pixel_values": patches.expand(-1, -1, 2, -1).flatten(1),
        "image_grid_thw": torch.tensor([[1, 12, 20]]),
    }
    expected, found = logits(load(source), row)[0, -1], torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert ((found - expected).norm() / expected.norm()) < 5e-3
