"""A head that is stored counts, whatever config.json says of tying: as plain transformers has it."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_compress.checkpoint import Checkpoint
from support.command_line import assert_says, plan, refusal
from support.running import compress, invoke, load, logits, tensors_of, write_recipe

torch.set_num_threads(1)
IDENTITY = {"stage": "depth", "layers": [0, 1, 2, 3]}
INT8 = {"stage": "quantize", "bits": 8, "group_size": 32, "method": "round_to_nearest"}
Folders = Callable[[Callable[[torch.Tensor], torch.Tensor]], Path]


@pytest.fixture(params=["llama", "glm4"])
def with_head(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Folders:
    """Copies of a tied checkpoint with a head beside it, which a function makes of the embedding."""

    def make(head_of: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        folder = copytree(make_checkpoint(request.param, tie_word_embeddings=True), tmp_path / "source")
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = head_of(tensors["model.embed_tokens.weight"]).clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_another_head_is_used_by_every_stage(with_head: Folders, tokens: torch.Tensor, tmp_path: Path):
    source = with_head(lambda embedding: embedding.flip(0))
    expected = logits(load(source), tokens)
    assert Checkpoint(source).shape.tie_word_embeddings is False
    kept = compress(tmp_path / "kept", source, IDENTITY)
    assert json.loads((kept / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(kept), tokens), expected, rtol=0, atol=0)
    rounded = compress(tmp_path / "rounded", source, INT8)
    error = logits(load(rounded), tokens) - expected
    assert error.norm() < 0.1 * expected.norm()


def test_another_head_is_counted_planned_and_can_be_tied(with_head: Folders, tmp_path: Path):
    source = with_head(lambda embedding: embedding.flip(0))
    found = json.loads(invoke("inspect", source, "--json").output)
    assert found["parameters_by_part"]["head"] == found["parameters_by_part"]["embedding"]
    recipe = write_recipe(tmp_path, source, [{"stage": "tie", "method": "average"}])
    before, after = plan(recipe)["checkpoints"]
    assert before["parameters"] - after["parameters"] == found["parameters_by_part"]["head"]


def test_an_equal_head_is_the_embedding(with_head: Folders, tmp_path: Path):
    source = with_head(lambda embedding: embedding)
    assert Checkpoint(source).shape.tie_word_embeddings is True
    assert "lm_head.weight" not in tensors_of(compress(tmp_path, source, IDENTITY))


def test_a_head_of_another_size_is_refused(with_head: Folders):
    source = with_head(lambda embedding: embedding[:500])
    assert_says(refusal("inspect", source), "lm_head.weight: shape [500, 64], expected [512, 64]")
