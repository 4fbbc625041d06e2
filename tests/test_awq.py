"""The arithmetic of quantization against slow, obvious versions of it: rounding, the AWQ scale search, folding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.quantization.awq import InputStatistics, sampled_rows, search_scale
from autoglm_compress.quantization.rounding import dequantize, quantize_symmetric, round_to_scales
from autoglm_compress.quantization.smoothing import Pair, fold

torch.set_num_threads(1)


# Rounding


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A weight with rows of very different sizes, some zero groups, some outliers; and a group size."""
    group = draw(st.sampled_from([32, 64, -1]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(draw(st.integers(1, 5)), 128) * 10 ** draw(st.floats(-4, 1))
    if draw(st.booleans()):
        weight[0, :64] = 0
    if draw(st.booleans()):
        weight[:, 70] *= 1000
    return weight, group


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BITS = st.sampled_from([4, 8])


@given(weights(), BITS, DTYPES)
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_at_most_half_a_step(case: tuple[torch.Tensor, int], bits: int, dtype: torch.dtype):
    weight, group = case
    integers, scales = quantize_symmetric(weight, bits, group, dtype)
    assert scales.dtype == dtype
    assert integers.min() >= -(2 ** (bits - 1))
    assert integers.max() <= 2 ** (bits - 1) - 1
    error = (dequantize(integers, scales, torch.float32) - weight).abs()
    step = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    # Scales rounded down leave the largest value beyond the last step, by its share of the scale's rounding (the
    # smallest fp16 numbers round by whole subnormals).
    rounding = torch.finfo(dtype).eps * step + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= step / 2 + 2 ** (bits - 1) * rounding + 1e-6 * weight.abs()).all()


@given(weights(), BITS, DTYPES)
@settings(max_examples=40, deadline=None)
def test_rounded_weights_stay_where_they_are(case: tuple[torch.Tensor, int], bits: int, dtype: torch.dtype):
    weight, group = case
    integers, scales = quantize_symmetric(weight, bits, group, dtype)
    for computed_in in (torch.float32, dtype):
        again = round_to_scales(dequantize(integers, scales, computed_in).float(), scales, bits)
        assert torch.equal(again, integers)


@pytest.mark.parametrize("group", [2, -1])
def test_rounding_is_what_a_loop_over_values_gives(group: int):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize_symmetric(weight, 4, group, torch.bfloat16)
    width = 8 if group == -1 else group
    for row in range(3):
        for column in range(8):
            members = weight[row, column // width * width :][:width]
            scale = (members.abs().max() / 7.5).bfloat16()
            assert scales[row, column // width] == scale
            assert integers[row, column] == min(max(round(float(weight[row, column] / scale)), -8), 7)


def test_zero_rows_stay_zero():
    integers, scales = quantize_symmetric(torch.zeros(2, 64), 4, 32, torch.float16)
    assert not integers.any()
    assert torch.equal(scales, torch.ones(2, 2, dtype=torch.float16))


# The scale search


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], torch.device("cpu"))
    for part in inputs.split(50):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("block", [24, 1024])
def test_output_error_is_the_change_of_the_outputs(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr("autoglm_compress.quantization.awq.BLOCK", block)
    torch.manual_seed(0)
    inputs, weight = torch.randn(300, 64) + 0.3, torch.randn(40, 64)
    statistics = statistics_of(inputs)
    delta = dequantize(*quantize_symmetric(weight, 4, 32, torch.float32), torch.float32) - weight
    explicit = (inputs @ delta.T).square().sum()
    torch.testing.assert_close(statistics.output_error(delta), explicit, rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics.absolute, inputs.abs().sum(0))


@pytest.mark.parametrize(("rows", "kept"), [(16, 16), (128, 64), (512, 64), (2048, 256), (4096, 512), (27392, 517)])
def test_sampled_rows_cover_the_matrix(rows: int, kept: int):
    sample = sampled_rows(torch.arange(rows).unsqueeze(1))
    assert sample.shape == (kept, 1)
    assert sample[-1] >= rows - rows // 64 - 1


@pytest.mark.parametrize("group", [32, -1])
def test_search_beats_plain_rounding_where_channels_stand_out(group: int):
    torch.manual_seed(0)
    inputs = torch.randn(500, 128)
    inputs[:, ::20] *= 30
    readers = [torch.randn(96, 128), torch.randn(32, 128)]
    pair = Pair("norm", ("a", "b"))
    choice = search_scale(readers, statistics_of(inputs), pair, bits=4, group_size=group, dtype=torch.bfloat16)
    assert choice.error < 0.7 * choice.error_rounding

    def explicit(scale: torch.Tensor) -> float:
        error = size = 0.0
        for weight in readers:
            rounded = dequantize(*quantize_symmetric(weight * scale, 4, group, torch.bfloat16), torch.float32) / scale
            error += float((inputs @ sampled_rows(rounded - weight).T).square().sum())
            size += float((inputs @ sampled_rows(weight).T).square().sum())
        return error / size

    assert choice.error == pytest.approx(explicit(choice.candidate.scale), rel=1e-3)
    assert choice.error_rounding == pytest.approx(explicit(torch.ones(128)), rel=1e-3)


def test_search_survives_dead_channels_and_zero_weights():
    inputs = torch.randn(100, 64)
    inputs[:, :8] = 0
    pair = Pair("norm", ("a",))
    for weight in (torch.randn(64, 64), torch.zeros(64, 64)):
        choice = search_scale([weight], statistics_of(inputs), pair, bits=4, group_size=32, dtype=torch.bfloat16)
        assert choice.candidate.scale.isfinite().all()
        assert choice.error <= choice.error_rounding


def test_scales_are_shared_by_the_query_heads_that_read_a_value_head():
    pair = Pair("v", ("o",), copies=2, block=3)
    per_query = torch.arange(12.0)
    assert pair.averaged(per_query).tolist() == [1.5, 2.5, 3.5, 7.5, 8.5, 9.5]
    assert pair.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


# Folding


def test_folding_is_exact_for_the_gain_as_stored():
    torch.manual_seed(0)
    gain, weight = torch.randn(32).bfloat16().float(), torch.randn(8, 32)
    gain[3] = 0
    tensors = {"norm.weight": gain.clone(), "q.weight": weight.clone()}
    scale = torch.empty(32).uniform_(0.2, 5)
    folded = fold(tensors, Pair("norm", ("q",)), scale, {"norm.weight": torch.bfloat16})
    assert torch.equal(folded["norm.weight"], folded["norm.weight"].bfloat16().float())
    torch.testing.assert_close(folded["norm.weight"] * folded["q.weight"], gain * weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(folded["q.weight"], weight * scale, rtol=2**-8, atol=0)
    assert torch.equal(tensors["q.weight"], weight)


def test_folding_keeps_a_gain_that_would_leave_the_stored_range():
    tensors = {"norm.weight": torch.tensor([1e-6, 1.0, 6e4]), "q.weight": torch.ones(1, 3)}
    folded = fold(tensors, Pair("norm", ("q",)), torch.tensor([1e4, 2.0, 0.1]), {"norm.weight": torch.float16})
    assert folded["norm.weight"].tolist() == pytest.approx([1e-6, 0.5, 6e4])
    assert folded["q.weight"].tolist() == [[1.0, 2.0, 1.0]]
