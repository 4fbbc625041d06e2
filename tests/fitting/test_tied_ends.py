"""`tie` with passes: the ends of a model are trained to stand in for the untied one, nothing between them changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoglm_compress.fitting import descent, tied_ends
from autoglm_compress.fitting.tied_ends import end_layers
from support.running import compress, invoke, tensors_of, write_recipe

CALIBRATION = {"source": "python-docs", "samples": 16, "sequence_length": 64}


@pytest.mark.parametrize(
    ("layers", "first", "last"), [(2, [0], [1]), (3, [0], [2]), (4, [0, 1], [2, 3]), (36, [0, 1], [34, 35])]
)
def test_the_ends_are_two_layers_each_and_at_most_half(layers: int, first: list[int], last: list[int]):
    assert [list(end) for end in end_layers(layers)] == [first, last]


@pytest.mark.parametrize("family", ["glm", "qwen3"])
def test_ends_come_nearer_to_the_untied_model(
    family: str, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(descent, "RATE", 1e-2)
    monkeypatch.setattr(tied_ends, "MOST_LAYERS", 1)
    source = make_checkpoint(family)
    found = {
        passes: compress(tmp_path / str(passes), source, {"stage": "tie", "passes": passes}, calibration=CALIBRATION)
        for passes in (0, 6)
    }
    decisions = json.loads((found[6] / "stage.json").read_text())["decisions"]
    assert decisions["loss_after"] < decisions["loss_before"]
    assert decisions["output_error"] > 0
    plain, trained, before = tensors_of(found[0]), tensors_of(found[6]), tensors_of(source)
    layers = max(int(name.split(".")[2]) for name in before if name.startswith("model.layers."))
    for name, tensor in trained.items():
        inside = name.startswith("model.layers.") and 0 < int(name.split(".")[2]) < layers
        assert torch.equal(tensor, before[name]) == inside, name
        assert tensor.dtype == plain[name].dtype
    model = AutoModelForCausalLM.from_pretrained(found[6])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_one_layer_has_no_ends_of_its_own(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    stages = [{"stage": "depth", "layers": [0]}, {"stage": "tie", "passes": 1}]
    result = invoke("run", write_recipe(tmp_path, make_checkpoint("glm"), stages), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "passes" in result.output
    assert "one layer" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
