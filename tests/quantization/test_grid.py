"""Grids and rounding to them, against slow, obvious versions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization import grid as grid_module
from autoglm_compress.quantization.grid import FINE_STEP, SHRINKS, Grid, clipped_grid, grid_for

torch.set_num_threads(1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SCHEMES = st.builds(Scheme, st.sampled_from([4, 8]), st.sampled_from([32, 64, -1]), st.booleans())


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """A weight with rows of very different sizes, some zero groups, some outliers, some of one sign."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(draw(st.integers(1, 5)), 128) * 10 ** draw(st.floats(-4, 1))
    if draw(st.booleans()):
        weight[0, :64] = 0
    if draw(st.booleans()):
        weight[:, 70] *= 1000
    if draw(st.booleans()):
        weight[-1] = weight[-1].abs() * draw(st.sampled_from([-1, 1]))
    return weight


def limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def per_value(grid: Grid, of: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [out, groups] as one per input, 128 in all."""
    return of.float().repeat_interleave(128 // grid.scales.shape[1], dim=1)


@given(weights(), SCHEMES, DTYPES)
@settings(max_examples=100, deadline=None)
def test_rounding_errs_by_at_most_half_a_step(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype):
    grid = grid_for(weight, scheme, dtype)
    integers = grid.integers(weight)
    assert grid.scales.dtype == dtype
    assert (integers.dtype, integers.shape) == (torch.int8, weight.shape)
    lowest, highest = limits(scheme.bits)
    assert integers.min() >= lowest
    assert integers.max() <= highest
    step = per_value(grid, grid.scales).abs()
    # A scale as stored is not quite the range's share; the smallest fp16 numbers round by whole subnormals.
    rounding = torch.finfo(dtype).eps * step + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = step / 2 + 2**scheme.bits * rounding + 1e-6 * weight.abs()
    if not scheme.symmetric:
        allowed += step / 2 * ((integers == lowest) | (integers == highest))  # where the zero point was rounded away
    assert ((grid.values(integers, torch.float32) - weight).abs() <= allowed).all()


@given(weights(), SCHEMES, DTYPES, st.sampled_from(SHRINKS))
@settings(max_examples=60, deadline=None)
def test_values_inside_the_covered_range_err_by_half_a_step(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float
):
    grid = grid_for(weight, scheme, dtype, shrink)
    scales = per_value(grid, grid.scales)
    zeros = 0 if grid.zeros is None else per_value(grid, grid.zeros)
    ends = [(end - zeros) * scales for end in limits(scheme.bits)]
    inside = (weight >= torch.minimum(*ends)) & (weight <= torch.maximum(*ends))
    error = (grid.rounded(weight) - weight).abs()
    assert (error <= 0.5001 * scales.abs() + 1e-6 * weight.abs())[inside].all()


@given(weights(), SCHEMES, DTYPES)
@settings(max_examples=60, deadline=None)
def test_rounded_weights_stay_where_they_are(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype):
    grid = grid_for(weight, scheme, dtype)
    integers = grid.integers(weight)
    assert torch.equal(grid.values(integers, torch.float32), grid.rounded(weight))
    assert torch.equal(grid.integers(grid.rounded(weight)), integers)
    steps = integers.float() - (0 if grid.zeros is None else per_value(grid, grid.zeros))
    exact = steps.abs() < 2 ** (scheme.bits - 1)  # of more steps bf16 cannot tell one from the next
    assert torch.equal(grid.integers(grid.values(integers, dtype).float())[exact], integers[exact])


@given(weights(), st.sampled_from([4, 8]), DTYPES)
@settings(max_examples=60, deadline=None)
def test_the_extreme_value_is_on_the_side_with_one_more_integer(weight: torch.Tensor, bits: int, dtype: torch.dtype):
    grid = grid_for(weight, Scheme(bits, 32), dtype)
    grouped = weight.unflatten(1, (-1, 32))
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # Below, an fp16 scale is too coarse to tell.
    counts = (grid.scales.float().abs() > 2**-14) & (extreme != 0)
    assert torch.equal(grid.scales.sign()[counts].float(), -extreme.sign()[counts])
    found = grid.integers(weight).unflatten(1, (-1, 32)).gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    assert (found[counts] <= limits(bits)[0] + 1).all()


@pytest.mark.parametrize("group", [2, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_what_a_loop_over_values_gives(group: int, symmetric: bool):
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    grid = grid_for(weight, Scheme(4, group, symmetric), torch.bfloat16)
    integers = grid.integers(weight)
    for row in range(5):
        for column in range(8):
            width = 8 if group == -1 else group
            members = weight[row, column // width * width :][:width].tolist()
            if symmetric:
                scale = torch.tensor(-max(members, key=abs) / 7.5).bfloat16()
                zero = 0
            else:
                low, high = min(*members, 0.0), max(*members, 0.0)
                scale = torch.tensor((high - low) / 15).bfloat16()
                zero = min(max(round(-8 - low / float(scale)), -8), 7)
                assert grid.zeros[row, column // width] == zero
            assert grid.scales[row, column // width] == scale
            expected = min(max(round(float(weight[row, column]) / float(scale)) + zero, -8), 7)
            assert integers[row, column] == expected
            value = (expected - zero) * float(scale)
            assert grid.values(integers, torch.float32)[row, column] == pytest.approx(value)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero(symmetric: bool):
    scheme = Scheme(4, 32, symmetric)
    for grid in (
        grid_for(torch.zeros(2, 64), scheme, torch.float16),
        clipped_grid(torch.zeros(2, 64), scheme, torch.float16, torch.ones(64)),
    ):
        assert torch.equal(grid.scales, torch.ones(2, 2, dtype=torch.float16))
        assert not grid.rounded(torch.zeros(2, 64)).any()
        assert not grid.values(grid.integers(torch.zeros(2, 64)), torch.float32).any()


@given(weights(), SCHEMES, DTYPES)
@settings(max_examples=30, deadline=None)
def test_zero_is_one_of_the_values(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype):
    grid = grid_for(weight, scheme, dtype)
    assert not grid.rounded(torch.zeros_like(weight)).any()


def test_the_grid_of_some_rows():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        grid = grid_for(weight, Scheme(4, 32, symmetric), torch.bfloat16)
        for which in (slice(2, 5), torch.tensor([0, 3])):
            assert torch.equal(grid.rows(which).rounded(weight[which]), grid.rounded(weight)[which])


# Clipping


def group_errors(weight: torch.Tensor, grid: Grid, column_weights: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each group, [out, groups]."""
    error = (grid.rounded(weight) - weight).square() * column_weights
    return error.unflatten(1, (grid.scales.shape[1], -1)).sum(-1)


@given(weights(), SCHEMES, DTYPES, st.booleans())
@settings(max_examples=30, deadline=None)
def test_clipping_finds_the_best_of_all_ranges(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, weighted: bool
):
    column_weights = torch.rand(128) if weighted else torch.ones(128)
    found = clipped_grid(weight, scheme, dtype, column_weights)

    def error(shrink: float | torch.Tensor) -> torch.Tensor:
        return group_errors(weight, grid_for(weight, scheme, dtype, shrink), column_weights)

    shrinks = torch.tensor(SHRINKS)
    coarse = torch.stack([error(torch.full_like(found.scales.float(), shrink)) for shrink in shrinks])
    best = shrinks[coarse.argmin(0)]
    tried = torch.stack([coarse.amin(0), error(best - FINE_STEP), error(best + FINE_STEP)])
    errors = group_errors(weight, found, column_weights)
    assert torch.equal(errors, tried.amin(0))
    assert (errors <= group_errors(weight, grid_for(weight, scheme, dtype), column_weights)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_large_weight_is_clipped_part_by_part(symmetric: bool, monkeypatch: pytest.MonkeyPatch):
    weight, scheme = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), Scheme(4, 32, symmetric)
    whole = clipped_grid(weight, scheme, torch.bfloat16, torch.ones(64))
    monkeypatch.setattr(grid_module, "ELEMENTS_AT_ONCE", 64 * 3)
    parts = clipped_grid(weight, scheme, torch.bfloat16, torch.ones(64))
    assert torch.equal(parts.scales, whole.scales)
    assert symmetric or torch.equal(parts.zeros, whole.zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_in_a_column_that_does_not_count_is_clipped(symmetric: bool):
    torch.manual_seed(0)
    weight = torch.rand(4, 32)
    weight[:, 5] = 1.5
    scheme, column_weights = Scheme(4, 32, symmetric), torch.ones(32)
    column_weights[5] = 0
    plain = grid_for(weight, scheme, torch.float32)
    clipped = clipped_grid(weight, scheme, torch.float32, column_weights)
    assert (clipped.scales.abs() < plain.scales.abs()).all()
