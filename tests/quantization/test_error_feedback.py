"""Rounding with error feedback, against GPTQ as its authors state it and against plain rounding."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization import error_feedback, input_statistics
from autoglm_compress.quantization.error_feedback import (
    DAMPING,
    Feedback,
    feedback_of,
    refit_scales,
    round_with_feedback,
)
from autoglm_compress.quantization.grid import Grid, clipped_grid, grid_for

torch.set_num_threads(1)
SCHEMES = [Scheme(4, 16), Scheme(4, 16, symmetric=False), Scheme(4, -1), Scheme(8, 32)]


def correlated(tokens: int, features: int, seed: int = 0, rank: int = 8, noise: float = 0.3) -> torch.Tensor:
    """Inputs [tokens, features] of which a few directions hold most, and some features are larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, features, generator=generator)
    inputs = torch.randn(tokens, rank, generator=generator) @ mixing
    inputs += noise * torch.randn(tokens, features, generator=generator)
    return inputs * torch.rand(features, generator=generator).mul(3).exp()


def random_weight(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def damped(gram: torch.Tensor) -> torch.Tensor:
    """In fp64."""
    gram = gram.double()
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error_of(values: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    delta = (values - weight).double()
    return float((delta @ gram.double() * delta).sum())


def gptq(weight: torch.Tensor, grid: Grid, gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper, one feature after the other in an order, in fp64."""
    lowest, highest = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    features = weight.shape[1]
    size = features // grid.scales.shape[1]
    inverse = torch.linalg.inv(damped(gram)[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, integers = weight.double()[:, order], torch.empty(weight.shape, dtype=torch.int8)
    for place, feature in enumerate(order.tolist()):
        scale = grid.scales[:, feature // size].double()
        zero = 0 if grid.zeros is None else grid.zeros[:, feature // size].double()
        nearest = ((left[:, place] / scale).round() + zero).clamp(lowest, highest)
        integers[:, feature] = nearest.to(torch.int8)
        error = (left[:, place] - (nearest - zero) * scale) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    return integers


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch):
    """Products of fp32 matrices in fp32, also where the CPU has units for bf16."""
    monkeypatch.setattr(error_feedback, "fast_products", nullcontext)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [20, 400])
def test_the_integers_are_those_of_gptq(scheme: Scheme, tokens: int):
    inputs, weight = correlated(tokens, 96), random_weight(40, 96)
    gram = inputs.T @ inputs
    grid = grid_for(weight, scheme, torch.bfloat16)
    feedback = feedback_of(gram.clone())
    found = round_with_feedback(weight, grid, feedback)
    assert found.dtype == torch.int8
    expected = gptq(weight, grid, gram, feedback.order.flip(0))
    rows = (found != expected).any(1)  # a tie that fp32 breaks the other way changes what follows in its row
    assert rows.float().mean() <= 0.05
    errors = [error_of(grid.values(integers, torch.float32), weight, damped(gram)) for integers in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_the_largest_features_are_rounded_first():
    inputs = correlated(100, 64)
    gram = inputs.T @ inputs
    sizes = gram.diagonal()[feedback_of(gram.clone()).order]
    assert (sizes.diff() >= 0).all()


def test_without_correlation_it_is_plain_rounding():
    weight = random_weight(20, 64)
    gram = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
    for scheme in SCHEMES:
        grid = grid_for(weight, scheme, torch.bfloat16)
        assert torch.equal(round_with_feedback(weight, grid, feedback_of(gram.clone())), grid.integers(weight))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [20, 400])
def test_products_in_bf16_cost_little(scheme: Scheme, tokens: int, monkeypatch: pytest.MonkeyPatch):
    """Where the CPU has no units for bf16 both are the same."""
    inputs, weight = correlated(tokens, 96), random_weight(40, 96)
    grid, feedback = grid_for(weight, scheme, torch.bfloat16), feedback_of(inputs.T @ inputs)
    errors = []
    for _ in range(2):
        values = grid.values(round_with_feedback(weight, grid, feedback), torch.float32)
        errors.append(error_of(values, weight, damped(inputs.T @ inputs)))
        monkeypatch.setattr(error_feedback, "fast_products", nullcontext)
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("block", [1, 7, 32, 95])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_change_nothing(block: int, scheme: Scheme, monkeypatch: pytest.MonkeyPatch):
    inputs, weight = correlated(200, 96), random_weight(30, 96)
    grid, feedback = grid_for(weight, scheme, torch.bfloat16), feedback_of(inputs.T @ inputs)
    monkeypatch.setattr(error_feedback, "BLOCK", 96)
    whole = round_with_feedback(weight, grid, feedback)
    monkeypatch.setattr(error_feedback, "BLOCK", block)
    parts = round_with_feedback(weight, grid, feedback)
    assert (parts != whole).any(1).float().mean() <= 0.04  # products in another order break a rare tie


# What it is for


@given(
    st.integers(0, 2**16),
    st.sampled_from([10, 50, 300, 2000]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([0.01, 1, 100]),
    st.sampled_from(SCHEMES),
)
@settings(max_examples=80, deadline=None)
def test_it_is_hardly_ever_worse_than_plain_rounding(seed: int, tokens: int, rank: int, noise: float, scheme: Scheme):
    inputs, weight = correlated(tokens, 64, seed, rank, noise), random_weight(16, 64, seed)
    gram = inputs.T @ inputs
    feedback = feedback_of(gram.clone())
    grid = clipped_grid(weight, scheme, torch.bfloat16, feedback.conditional)
    found = error_of(grid.values(round_with_feedback(weight, grid, feedback), torch.float32), weight, damped(gram))
    assert found <= 1.02 * error_of(grid.rounded(weight), weight, damped(gram))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_much_better_on_correlated_inputs(scheme: Scheme):
    inputs, weight = correlated(400, 96), random_weight(40, 96)
    gram = inputs.T @ inputs
    grid = grid_for(weight, scheme, torch.bfloat16)
    found = grid.values(round_with_feedback(weight, grid, feedback_of(gram.clone())), torch.float32)
    plain = error_of(grid.rounded(weight), weight, gram)
    assert error_of(found, weight, gram) < 0.6 * plain
    explicit = float((inputs @ (found - weight).T).square().sum())
    assert explicit < 0.6 * float((inputs @ (grid.rounded(weight) - weight).T).square().sum())


# Scales for the integers


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_row_is_that_of_least_squares(symmetric: bool):
    inputs, weight = correlated(400, 96), random_weight(40, 96)
    gram = inputs.T @ inputs
    grid = grid_for(weight, Scheme(4, -1, symmetric), torch.float32)
    integers = round_with_feedback(weight, grid, feedback_of(gram.clone()))
    found = refit_scales(weight, integers, grid, feedback_of(gram.clone()))
    steps = integers.double() - (0 if grid.zeros is None else grid.zeros.double())
    expected = ((steps @ damped(gram)) * weight).sum(1) / ((steps @ damped(gram)) * steps).sum(1)
    torch.testing.assert_close(found.scales[:, 0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("exact_products")
@given(st.integers(0, 2**16), st.sampled_from([20, 300]), st.sampled_from(SCHEMES))
@settings(max_examples=40, deadline=None)
def test_scales_for_the_integers_never_enlarge_the_error(seed: int, tokens: int, scheme: Scheme):
    inputs, weight = correlated(tokens, 64, seed), random_weight(16, 64, seed)
    gram = inputs.T @ inputs
    feedback = feedback_of(gram.clone())
    grid = clipped_grid(weight, scheme, torch.bfloat16, feedback.conditional)
    integers = round_with_feedback(weight, grid, feedback)
    found = refit_scales(weight, integers, grid, feedback)
    before, after = (error_of(each.values(integers, torch.float32), weight, damped(gram)) for each in (grid, found))
    assert after <= 1.001 * before


def test_scales_of_groups_of_zeros_and_beyond_the_dtype_stay():
    inputs, weight = correlated(400, 64), random_weight(3, 64)
    weight[1] = 0
    weight[2] *= 1e-8
    feedback = feedback_of(inputs.T @ inputs)
    grid = clipped_grid(weight, Scheme(4, 32), torch.float16, feedback.conditional)
    found = refit_scales(weight, round_with_feedback(weight, grid, feedback), grid, feedback)
    assert torch.equal(found.scales[1:], grid.scales[1:])
    assert not torch.equal(found.scales[0], grid.scales[0])


# The factor


@pytest.mark.parametrize("tokens", [20, 300])
def test_output_error_is_that_of_the_damped_gram(tokens: int):
    inputs, delta = correlated(tokens, 64), random_weight(10, 64, 3)
    gram = inputs.T @ inputs
    found = feedback_of(gram.clone()).output_error(delta)
    assert float(found) == pytest.approx(error_of(delta, torch.zeros_like(delta), damped(gram)), rel=1e-3)


@pytest.mark.parametrize("block", [7, 256])
def test_conditional_is_what_is_left_after_the_features_before_it(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_statistics, "BLOCK", block)
    inputs = correlated(300, 48)
    gram = inputs.T @ inputs
    feedback, full = feedback_of(gram.clone()), damped(gram)
    for place, feature in enumerate(feedback.order.tolist()):
        before = feedback.order[:place]
        explained = full[feature, before] @ torch.linalg.solve(full[before][:, before], full[before, feature])
        left = float(full[feature, feature] - explained)
        assert float(feedback.conditional[feature]) == pytest.approx(left, rel=1e-3)


def test_scaled_is_the_factor_of_the_scaled_gram():
    inputs = correlated(300, 48)
    gram = inputs.T @ inputs
    scale = torch.rand(48, generator=torch.Generator().manual_seed(2)) * 3 + 0.2
    feedback = feedback_of(gram.clone())
    order = feedback.order.clone()
    scaled = feedback.scaled(scale)
    assert torch.equal(scaled.order, order)
    expected = (damped(gram) / scale / scale[:, None])[order][:, order]
    factor = torch.linalg.cholesky(expected)
    unit = (factor / factor.diagonal()).float()
    torch.testing.assert_close(scaled.unit, unit, rtol=1e-3, atol=1e-3 * float(unit.abs().max()))
    torch.testing.assert_close(scaled.conditional[order], factor.diagonal().square().float(), rtol=1e-3, atol=0)
    delta = random_weight(10, 48, 3)
    assert float(scaled.output_error(delta)) == pytest.approx(
        float(feedback_of(gram.clone()).output_error(delta / scale)), 1e-3
    )


# Inputs that are hard to factor


def degenerate(kind: str) -> torch.Tensor:
    inputs = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    if kind == "fewer tokens than features":
        inputs = inputs[:5]
    elif kind == "one token":
        inputs = inputs[:1]
    elif kind == "dead feature":
        inputs[:, 7] = 0
    elif kind == "most features dead":
        inputs[:, 3:] = 0
    elif kind == "all zero":
        inputs[:] = 0
    elif kind == "large feature":
        inputs[:, 9] *= 1e4
    elif kind == "constant columns":
        inputs[:, 10:20] = 1
    elif kind == "equal columns":
        inputs[:] = inputs[:, :1] * 100
    elif kind == "tiny":
        inputs *= 1e-15
    elif kind == "huge":
        inputs *= 1e12
    return inputs


KINDS = [
    "fewer tokens than features",
    "one token",
    "dead feature",
    "most features dead",
    "all zero",
    "large feature",
    "constant columns",
    "equal columns",
    "tiny",
    "huge",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_inputs(kind: str, symmetric: bool):
    inputs, weight = degenerate(kind), random_weight(24, 64)
    weight[5] = 0
    gram = inputs.T @ inputs
    feedback = feedback_of(gram.clone())
    assert feedback.unit.isfinite().all()
    assert feedback.conditional.isfinite().all()
    assert (feedback.conditional > 0).all()
    grid = clipped_grid(weight, Scheme(4, 32, symmetric), torch.bfloat16, feedback.conditional)
    integers = round_with_feedback(weight, grid, feedback)
    values = grid.values(integers, torch.float32)
    assert values.isfinite().all()
    assert not values[5].any()
    plain = error_of(grid.rounded(weight), weight, gram)
    assert (
        error_of(values, weight, gram) <= 1.02 * plain + 1e-2 * float(gram.diagonal().double().mean()) * weight.numel()
    )
    if kind == "all zero":
        assert torch.equal(integers, grid.integers(weight))


@pytest.mark.parametrize("block", [7, 256])
def test_a_gram_matrix_that_is_not_positive_definite_gets_more_damping(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_statistics, "BLOCK", block)
    gram = torch.ones(32, 32) - 0.5 * torch.eye(32)  # 31 eigenvalues of -0.5
    feedback = feedback_of(gram.clone())
    assert isinstance(feedback, Feedback)
    assert feedback.unit.isfinite().all()
    delta = random_weight(4, 32)
    damping = 0.5 * DAMPING * 10**2  # 0.015 and 0.15 are too little
    expected = error_of(delta, torch.zeros_like(delta), gram + damping * torch.eye(32))
    assert float(feedback.output_error(delta)) == pytest.approx(expected, rel=1e-3)
