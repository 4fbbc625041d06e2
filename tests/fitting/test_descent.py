"""Fits by gradient: the losses against the obvious version, and that they help or are not used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autoglm_compress.fitting import descent
from autoglm_compress.fitting.descent import PairedStates, distil_head
from support.running import Kill, compress, digests, run, run_until_killed, same_tensors, write_recipe

CALIBRATION = {"source": "python-docs", "samples": 16, "sequence_length": 64}
CUTS = [{"stage": "depth", "layers": [0, 1, 3]}, {"stage": "ffn", "intermediate_size": 64}]

RIDGE = {"stage": "refit", "layer_passes": 0, "logit_passes": 0}


def test_a_head_is_found_that_gives_the_same_next_tokens():
    torch.manual_seed(0)
    states, true = torch.randn(32, 8, 6), torch.randn(12, 6)
    head = true + 0.3 * torch.randn(12, 6)
    batches = [
        PairedStates(
            torch.zeros(part.shape[:2], dtype=torch.long),
            lambda part=part: part,
            lambda part=part: part,
            torch.arange(8) == 7,
        )
        for part in states.split(8)
    ]
    descent = distil_head(head, batches, (nn.Identity(), nn.Identity()), true, passes=30)
    assert descent.improved
    assert descent.after < descent.before / 20


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_layers_and_head_come_nearer_to_the_original(
    family: str, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(descent, "RATE", 3e-3)  # so few tokens say little about so many weights
    source = make_checkpoint(family)
    results = {}
    for name, passes in {"ridge": (0, 0), "distilled": (2, 3)}.items():
        refit = {"stage": "refit", "layer_passes": passes[0], "logit_passes": passes[1]}
        results[name] = compress(tmp_path / name, source, *CUTS, refit, calibration=CALIBRATION)
    record = json.loads((results["distilled"] / "stage.json").read_text())["decisions"]
    losses = [*record["distilled_layers"], record["distilled_head"]]
    assert sum(loss["loss_after"] < loss["loss_before"] for loss in losses) >= 2
    assert not same_tensors(*results.values())
    plain = json.loads((results["ridge"] / "stage.json").read_text())["decisions"]
    assert not any([*plain["distilled_layers"], plain["distilled_head"]])


def test_before_a_tied_head_the_last_layer_is_fitted(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(descent, "RATE", 3e-3)
    source = make_checkpoint("qwen3", tie_word_embeddings=True)
    ridge = compress(tmp_path / "ridge", source, *CUTS, RIDGE, calibration=CALIBRATION)
    fitted = compress(tmp_path / "fitted", source, *CUTS, RIDGE | {"logit_passes": 3}, calibration=CALIBRATION)
    first, second, last = json.loads((fitted / "stage.json").read_text())["decisions"]["distilled_layers"]
    assert first is second is None
    assert last["loss_after"] < last["loss_before"]
    assert not same_tensors(ridge, fitted)


def test_what_does_not_help_is_not_used(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(descent, "RATE", 10.0)
    source = make_checkpoint("glm")
    results = [
        compress(tmp_path / name, source, *CUTS, refit, calibration=CALIBRATION)
        for name, refit in {"ridge": RIDGE, "wild": RIDGE | {"layer_passes": 1, "logit_passes": 1}}.items()
    ]
    assert same_tensors(*results)


def test_a_refit_killed_while_it_descends_goes_on_to_the_same_bytes(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
):
    stages = [CUTS[0], {"stage": "refit", "layer_passes": 1}]
    recipes = [write_recipe(tmp_path / name, make_checkpoint("glm"), stages) for name in ("killed", "undisturbed")]
    assert run_until_killed(recipes[0], Kill("autoglm_compress.fitting.refit:distil_layer", call=2, before=False))
    for recipe in recipes:
        run(recipe)
    assert digests(recipes[0].parent / "out") == digests(recipes[1].parent / "out")
