"""Folders of models with towers as their owners have them: larger models, older configs, processors, missing towers."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from autoglm_compress.architecture.family_files import built_in
from support.command_line import assert_says, plan, refusal
from support.multimodal import FAMILIES, load, logits, media_rows, save, text_row
from support.running import compress, invoke, run, tensors_of, write_recipe

torch.set_num_threads(1)
DEPTH = {"stage": "depth", "layers": [0, 1, 2, 3]}
OMNI = "qwen2_5omnithinker"


@pytest.fixture
def whole_omni(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, Path]:
    """A thinker, and a folder of the whole model with the same thinker."""
    thinker = save(OMNI, tmp_path / "thinker", tokenizer)
    whole = copytree(thinker, tmp_path / "whole", ignore=lambda *_: ["model.safetensors"])
    tensors = {f"thinker.{name}": tensor for name, tensor in tensors_of(thinker).items()}
    others = {f"{part}.layer.weight": torch.ones(4, 4) for part in ("talker.model", "token2wav")}
    save_file(tensors | others, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((thinker / "config.json").read_text())
    outer = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "dtype": config.pop("dtype")}
    config["architectures"] = ["Qwen2_5OmniNaViTThinkerForConditionalGeneration"]  # as in public folders
    (whole / "config.json").write_text(json.dumps(outer | {"thinker_config": config}))
    return thinker, whole


def test_of_a_whole_omni_model_the_thinker_is_read_and_the_rest_named(whole_omni: tuple[Path, Path], tmp_path: Path):
    thinker, whole = whole_omni
    recipe = write_recipe(tmp_path / "run", whole, [DEPTH])
    assert plan(recipe)["checkpoints"] == plan(write_recipe(tmp_path / "own", thinker, [DEPTH]))["checkpoints"]
    said = run(recipe)
    assert_says(said, "left out, as the model does not use them: talker.*, token2wav.*")
    result = tmp_path / "run/out/01-depth"
    assert json.loads((result / "stage.json").read_text())["left_out"] == ["talker.*", "token2wav.*"]
    assert json.loads(invoke("inspect", whole, "--json").output)["left_out"] == ["talker.*", "token2wav.*"]
    before, after = tensors_of(thinker), tensors_of(result)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, reference = load(result), load(thinker)
    assert type(model).__name__ == FAMILIES[OMNI].architecture
    for row in (text_row(), *media_rows(OMNI)):
        assert torch.equal(logits(model, row), logits(reference, row))


def test_a_whole_omni_model_without_a_thinkers_config(whole_omni: tuple[Path, Path]):
    _, whole = whole_omni
    config = json.loads((whole / "config.json").read_text())
    config.pop("thinker_config")
    (whole / "config.json").write_text(json.dumps(config))
    assert_says(refusal("inspect", whole), "config.json", "thinker_config: missing")


@pytest.mark.parametrize("stage", [DEPTH, {"stage": "width", "hidden_size": 32, "num_attention_heads": 2}])
def test_a_config_with_the_text_sizes_at_its_root_as_older_versions_wrote(
    stage: dict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save("qwen2_5_vl", tmp_path / "source", tokenizer)
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    old = copytree(source, tmp_path / "old")
    (old / "config.json").write_text(json.dumps(text | config))
    results = [compress(tmp_path / folder.name / "run", folder, stage) for folder in (source, old)]
    models = [load(result) for result in results]
    for row in (text_row(), *media_rows("qwen2_5_vl")):
        expected, found = (logits(model, row) for model in models)
        assert torch.equal(expected, found)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_that_are_missing_are_named(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save(name, tmp_path / "source", tokenizer)
    prefixes = built_in()[FAMILIES[name].architecture].kept
    text = {
        tensor: value for tensor, value in tensors_of(source).items() if not tensor.startswith((*prefixes.values(),))
    }
    save_file(text, source / "model.safetensors", metadata={"format": "pt"})
    for command in (("inspect", source), ("run", write_recipe(tmp_path, source, [DEPTH]))):
        message = refusal(*command)
        assert_says(message, *(f"{prefix}*: missing, all of the tower {tower!r}" for tower, prefix in prefixes.items()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("glm4v", "not JSON"),
        ("glm4v", '{"image_processor_type": "NoSuchProcessor"}'),
        ("qwen2audio", '{"feature_extractor_type": "NoSuchExtractor"}'),
        (OMNI, '{"image_processor_type": "Qwen2VLImageProcessor", "feature_extractor_type": "NoSuchExtractor"}'),
    ],
)
def test_a_processor_that_does_not_load_is_told_before_the_run(
    name: str, content: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save(name, tmp_path / "source", tokenizer)
    (source / "preprocessor_config.json").write_text(content)
    message = refusal("run", write_recipe(tmp_path, source, [DEPTH]), "--output", tmp_path / "out")
    assert_says(message, "preprocessor_config.json: transformers cannot read the processor", "Copy the file")
    assert not list((tmp_path / "out").glob("01-*"))


def test_processor_files_come_along(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save("glm4v", tmp_path / "source", tokenizer)
    files = {
        "preprocessor_config.json": '{"image_processor_type": "Glm4vImageProcessor", "patch_size": 2}',
        "video_preprocessor_config.json": '{"video_processor_type": "Glm4vVideoProcessor"}',
        "processor_config.json": '{"processor_class": "Glm4vProcessor"}',
        "chat_template.jinja": "{{ messages }}",
    }
    for file, content in files.items():
        (source / file).write_text(content)
    result = compress(tmp_path, source, DEPTH)
    assert {file: (result / file).read_text() for file in files} == files
