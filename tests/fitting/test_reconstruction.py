"""Least squares, rotation, tying and the refit: against closed forms, and against what they promise."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from autoglm_compress.cutting.rotation import principal_directions
from autoglm_compress.cutting.tying import pair_moments, tie_least_squares
from autoglm_compress.fitting.ridge import (
    Examples,
    InputExamples,
    InputMoments,
    Moments,
    NotFiniteError,
    fit,
    ridge,
)
from support.models import FAMILIES, build_model, silence_channels
from support.running import Kill, compress, digests, load, logits, run, run_until_killed, same_tensors, write_recipe

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
CALIBRATION = {"source": "python-docs", "samples": 16, "sequence_length": 64}
ROTATABLE = [family for family in FAMILIES if family != "glm4"]


def moments_of(inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
    moments = Moments.zeros(inputs.shape[1], targets.shape[1], inputs.device)
    moments.add(inputs, targets, torch.ones(len(inputs)) if weights is None else weights)
    return moments


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.sampled_from([1e-3, 1e-1, 10.0]))
def test_ridge_solves_its_normal_equations(seed: int, strength: float):
    torch.manual_seed(seed)
    x, y, prior = torch.randn(40, 6), torch.randn(40, 3), torch.randn(3, 6)
    moments = moments_of(x, y)
    mu = strength * (x**2).sum(0).mean()
    stacked = torch.cat([x, mu.sqrt() * torch.eye(6)]), torch.cat([y, mu.sqrt() * prior.T])
    expected = torch.linalg.lstsq(*stacked).solution.T
    torch.testing.assert_close(ridge(moments, prior, strength), expected, rtol=1e-3, atol=1e-4)


def test_errors_are_the_weighted_squares():
    torch.manual_seed(0)
    x, y, w, weight = torch.randn(30, 5), torch.randn(30, 4), torch.rand(30), torch.randn(4, 5)
    expected = (w[:, None] * (y - x @ weight.T) ** 2).sum(0)
    torch.testing.assert_close(moments_of(x, y, w).errors(weight), expected, rtol=1e-4, atol=1e-4)


def test_input_moments_give_the_moments_of_any_target():
    torch.manual_seed(0)
    x, other, weight = torch.randn(30, 5), torch.randn(30, 7), torch.randn(4, 7)
    sums = InputMoments(5, 7, x.device, for_errors=True)
    sums.add(x, other)
    found, expected = sums.for_targets(weight), moments_of(x, other @ weight.T)
    for name in ("gram", "cross", "target_square"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


def test_examples_judge_a_fit_as_sums_over_them_do():
    torch.manual_seed(0)
    x, other, fixed, weight = torch.randn(12, 20), torch.randn(12, 9), torch.randn(4, 9), torch.randn(4, 20)
    sums, examples = InputMoments(20, 9, x.device, for_errors=True), InputExamples()
    for part in (slice(0, 5), slice(5, 5), slice(5, 12)):
        sums.add(x[part], other[part])
        examples.add(x[part], other[part])
    expected, found = sums.for_targets(fixed), examples.for_targets(fixed)
    torch.testing.assert_close(found.errors(weight), expected.errors(weight), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.target_square, expected.target_square, rtol=1e-4, atol=1e-3)
    weighted, targets, weights = Examples(), torch.randn(12, 4), torch.rand(12)
    weighted.add(x, targets, weights)
    expected = moments_of(x, targets, weights).errors(weight)
    torch.testing.assert_close(weighted.errors(weight), expected, rtol=1e-4, atol=1e-3)


def test_a_fit_among_few_tokens_is_that_of_their_sums():
    torch.manual_seed(0)
    x, y, w, prior = torch.randn(12, 20), torch.randn(12, 4), torch.rand(12), torch.randn(4, 20)
    examples = Examples()
    for part in (slice(0, 7), slice(7, 12)):
        examples.add(x[part], y[part], w[part])
    for strength in (1e-2, 1.0):
        expected = ridge(moments_of(x, y, w), prior, strength)
        torch.testing.assert_close(ridge(examples, prior, strength), expected, rtol=1e-3, atol=1e-4)
    assert ridge(examples, prior, 0.0).isfinite().all()
    examples.add(torch.full((1, 20), torch.inf), torch.ones(1, 4), torch.ones(1))
    with pytest.raises(NotFiniteError, match="infinite"):
        ridge(examples, prior, 1e-3)


def test_dead_and_dependent_inputs_keep_what_the_prior_says_about_them():
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    x = torch.cat([x, x[:, :1], torch.zeros(50, 1)], dim=1)
    prior = torch.randn(2, 6)
    moments = moments_of(x, x @ prior.T)
    weight = ridge(moments, prior, 1e-3)
    torch.testing.assert_close(weight, prior, rtol=1e-3, atol=1e-3)
    assert ridge(moments, prior, 0.0).isfinite().all()  # not even positive definite


def test_activations_that_overflow_are_an_error():
    moments = moments_of(torch.full((3, 2), torch.inf), torch.ones(3, 1))
    with pytest.raises(NotFiniteError, match="infinite"):
        ridge(moments, torch.zeros(1, 2), 1e-3)


def test_held_out_rows_keep_the_prior_where_a_fit_does_not_help():
    torch.manual_seed(0)
    true = torch.randn(2, 8)
    few, many = torch.randn(6, 8), torch.randn(500, 8)
    noisy = moments_of(few, few @ true.T + 5 * torch.randn(6, 2))
    found = fit(noisy, moments_of(many, many @ true.T), true)[0]
    assert found.strength is None
    assert found.weight is true or torch.equal(found.weight, true)
    clean = fit(moments_of(many, many @ true.T), moments_of(few, few @ true.T), torch.zeros(2, 8))[0]
    torch.testing.assert_close(clean.weight, true, rtol=0.05, atol=0.05)


def test_principal_directions_are_orthonormal_and_carry_most():
    torch.manual_seed(0)
    x = torch.randn(200, 10) @ torch.diag(torch.arange(10.0, 0, -1))
    basis = principal_directions(x.T @ x, 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=1e-5, atol=1e-5)
    kept = (x @ basis).square().sum()
    expected = torch.linalg.svdvals(x)[:4].square().sum()
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)


def test_a_pair_that_is_one_matrix_already_is_found():
    torch.manual_seed(0)
    embedding, gain = torch.randn(60, 8), torch.rand(8) + 0.5
    x = torch.randn(100, 8)
    head = embedding + torch.randn(8)  # the same row added to all: a softmax does not see it
    moments = pair_moments(embedding, head)
    tied = tie_least_squares(moments, gain, x.T @ x / 100, 10.0)
    assert tied.input_error == pytest.approx(0, abs=1e-6)
    assert tied.output_error == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(tied.matrix(embedding, head, moments), embedding, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tied.gain, gain, rtol=1e-3, atol=1e-3)


def test_the_errors_of_tying_are_those_of_the_matrix_it_gives():
    torch.manual_seed(0)
    embedding, head, gain, x = torch.randn(60, 8), torch.randn(60, 8), torch.rand(8) + 0.5, torch.randn(100, 8)
    moments = pair_moments(embedding, head)
    tied = tie_least_squares(moments, gain, x.T @ x / 100, 3.0)
    shared = tied.matrix(embedding, head, moments)
    centred = [matrix - matrix.mean(0) for matrix in (shared, embedding, head)]
    inputs = (centred[0] - centred[1]).square().sum() / centred[1].square().sum()
    logits_of = [x @ (centred[0] * tied.gain).T, x @ (centred[2] * gain).T]
    outputs = (logits_of[0] - logits_of[1]).square().sum() / logits_of[1].square().sum()
    assert tied.input_error == pytest.approx(float(inputs), rel=1e-4)
    assert tied.output_error == pytest.approx(float(outputs), rel=1e-4)
    torch.testing.assert_close(centred[0].norm(), centred[1].norm(), rtol=1e-4, atol=1e-4)
    assert tied.output_error < 1 / 2


def test_the_weight_of_the_logits_moves_errors_from_one_end_to_the_other():
    torch.manual_seed(0)
    embedding, head, gain, x = torch.randn(60, 8), torch.randn(60, 8), torch.rand(8) + 0.5, torch.randn(100, 8)
    moments = pair_moments(embedding, head)
    found = [tie_least_squares(moments, gain, x.T @ x / 100, weight) for weight in (0.1, 1.0, 3.0, 10.0)]
    inputs, outputs = ([getattr(tied, error) for tied in found] for error in ("input_error", "output_error"))
    assert inputs == sorted(inputs)
    assert outputs == sorted(outputs, reverse=True)


@pytest.mark.parametrize("family", ROTATABLE)
def test_a_rotation_that_drops_nothing_changes_nothing(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_checkpoint: Callable[..., Path]
):
    # Eight of the 64 channels carry nothing, so that 56 directions are all there is.
    model = build_model(family).float()
    silence_channels(model, 56)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    stage = {"stage": "width", "hidden_size": 56, "method": "pca"}
    result = compress(tmp_path, tmp_path / "source", stage, calibration=CALIBRATION)
    tokens = torch.arange(40)[None] * 7 % 512
    torch.testing.assert_close(logits(load(result), tokens), logits(model, tokens), rtol=1e-2, atol=1e-2)


def test_turning_twice_is_turning_once(tmp_path: Path, make_checkpoint: Callable[..., Path]):
    tokens = torch.arange(40)[None] * 7 % 512
    widths = {"once": [40], "twice": [48, 40]}
    results = []
    for name, sizes in widths.items():
        stages = [{"stage": "width", "name": f"w{size}", "hidden_size": size, "method": "pca"} for size in sizes]
        source = make_checkpoint("llama", dtype="float32")
        results.append(logits(load(compress(tmp_path / name, source, *stages, calibration=CALIBRATION)), tokens))
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)  # bf16 in between


@pytest.mark.parametrize("method", ["activation", "magnitude", "random"])
def test_channels_can_be_selected_in_a_turned_basis(method: str, tmp_path: Path, make_checkpoint: Callable[..., Path]):
    stages = [
        {"stage": "width", "name": "turned", "hidden_size": 48},
        {"stage": "width", "name": "selected", "hidden_size": 32, "method": method},
        {"stage": "refit"},
    ]
    result = compress(tmp_path, make_checkpoint("glm"), *stages, calibration=CALIBRATION)
    assert logits(load(result), torch.arange(20)[None]).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_leaves_an_uncut_model_as_it_is(family: str, tmp_path: Path, make_checkpoint: Callable[..., Path]):
    source = make_checkpoint(family)
    result = compress(tmp_path, source, {"stage": "refit"}, calibration=CALIBRATION)
    assert same_tensors(result, source)


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_brings_every_cut_back_towards_the_original(
    family: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
):
    source = make_checkpoint(family)
    cuts = [
        {"stage": "depth", "layers": [0, 1, 3]},
        {"stage": "ffn", "intermediate_size": 96},
        {"stage": "width", "hidden_size": 48},
        {"stage": "heads", "num_attention_heads": 6},
    ]
    recipe = write_recipe(tmp_path, source, [*cuts, {"stage": "refit"}], calibration=CALIBRATION)
    run(recipe)
    record = json.loads((tmp_path / "out/05-refit/stage.json").read_text())["decisions"]
    fits = [fit for layer in record["layers"] for fit in layer.values()] + [record["head"]]
    assert all(fit["error_after"] <= fit["error_before"] for fit in fits)
    assert sum(fit["error_after"] < fit["error_before"] for fit in fits) > len(fits) / 2
    tokens = torch.arange(60)[None] * 7 % 512
    original = logits(load(source), tokens)
    before, after = (
        (logits(load(tmp_path / "out" / name), tokens) - original).norm() for name in ("04-heads", "05-refit")
    )
    assert after < before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_killed_refit_goes_on_to_the_same_bytes(call: int, tmp_path: Path, make_checkpoint: Callable[..., Path]):
    stages = [{"stage": "depth", "layers": [1, 3]}, {"stage": "width", "hidden_size": 48}, {"stage": "refit"}]
    recipes = [write_recipe(tmp_path / name, make_checkpoint("glm"), stages) for name in ("killed", "undisturbed")]
    kill = Kill("autoglm_compress.forward.hidden_states:HiddenStates.commit", call=6 + call)
    assert run_until_killed(recipes[0], kill)
    for recipe in recipes:
        run(recipe)
    assert digests(recipes[0].parent / "out") == digests(recipes[1].parent / "out")
