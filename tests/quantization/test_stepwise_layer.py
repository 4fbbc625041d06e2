"""Layers that tokens go through in parts while they are quantized, against whole models."""

from pathlib import Path

import pytest
import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.hidden_states import HiddenStates
from autoglm_compress.forward.one_layer_model import OneLayerModel
from autoglm_compress.quantization.smoothing import smoothing_pairs
from autoglm_compress.quantization.stepwise_layer import KeptActivations, StepwiseLayer
from support.quantizing import FAMILIES, LAYERS, SIZES, batches, make_model, plain_model, run_stage

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

FINE = {"kl_divergence": 0.0, "logit_error": 0.0, "same_next_token": 1.0, "held_out_tokens": 1}
"""What no check of the result would fail for, which would walk through layers too."""


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("keeping", [True, False])
def test_a_layer_in_parts_is_the_whole_layer(tmp_path: Path, model_type: str, keeping: bool):
    """With weights that change between the parts: what is before a linear runs with the changed ones."""
    checkpoint = Checkpoint(make_model(tmp_path, model_type, dtype="float32"))
    rows = batches()
    states = HiddenStates(rows, SIZES["hidden_size"], torch.float32, None)
    states.embed(rows, checkpoint)
    states.commit()
    one_layer, family = OneLayerModel(checkpoint, torch.device("cpu"), torch.float32), checkpoint.family
    whole = plain_model(checkpoint)
    heard = {}
    for layer in range(LAYERS):
        module, run = one_layer.load(layer)
        parts = StepwiseLayer(module, run, rows, states, family, KeptActivations(tmp_path) if keeping else None)
        for pair in smoothing_pairs(checkpoint.shape):
            heard[layer, pair.readers[0]] = torch.cat(list(parts.inputs_of(pair.readers[0])))
            for name in pair.readers:
                changed = module.get_submodule(name).weight * 1.5
                module.get_submodule(name).weight = torch.nn.Parameter(changed, requires_grad=False)
                whole.model.layers[layer].get_submodule(name).weight.data.copy_(changed)
                parts.settle(name)
        parts.compute_outputs()
        states.commit()

    def check(name: tuple[int, str]) -> None:
        hook = lambda _, inputs: torch.testing.assert_close(inputs[0], heard.pop(name), rtol=1e-4, atol=1e-4)  # noqa: E731
        whole.model.layers[name[0]].get_submodule(name[1]).register_forward_pre_hook(hook)

    for name in list(heard):
        check(name)
    logits_in = []
    whole.model.norm.register_forward_pre_hook(lambda _, inputs: logits_in.append(inputs[0]))
    with torch.no_grad():
        whole(torch.cat(rows))
    assert not heard
    states_after = torch.cat([before for before, _ in states.pairs()])
    torch.testing.assert_close(states_after, logits_in[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_layer_is_quantized_for_what_the_quantized_ones_before_it_give(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
):
    entered: list[list[torch.Tensor]] = []
    load = OneLayerModel.load

    def spy(self, layer):
        module, run = load(self, layer)
        entered.append([])
        return module, lambda hidden, rows: entered[layer].append(hidden.clone()) or run(hidden, rows)

    source = make_model(tmp_path / "source", model_type, dtype="float32")
    with monkeypatch.context() as patches:
        patches.setattr(OneLayerModel, "load", spy)
        patches.setattr("autoglm_compress.stages.quantize.measure_agreement", lambda *_: FINE)
        run_stage(source, tmp_path, bits=4, group_size=32)
    quantized = plain_model(Checkpoint(tmp_path / "target"))
    expected: list[torch.Tensor] = []
    for layer in quantized.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    rows = batches()
    with torch.no_grad():
        quantized(torch.cat(rows))
    for layer in range(LAYERS):
        parts, rest = divmod(len(entered[layer]), len(rows))
        assert rest == 0
        for part in range(parts):
            found = torch.cat(entered[layer][part * len(rows) : (part + 1) * len(rows)])
            torch.testing.assert_close(found, expected[layer], rtol=1e-3, atol=1e-3)
