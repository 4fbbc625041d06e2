"""The AWQ scale search, the sums it goes by, and folding, against slow, obvious versions of them."""

import pytest
import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.quantization import input_statistics
from autoglm_compress.quantization.awq import candidate_scales, column_importance, sampled_rows, search_scale
from autoglm_compress.quantization.error_feedback import feedback_of
from autoglm_compress.quantization.grid import Grid, grid_for
from autoglm_compress.quantization.input_statistics import InputStatistics
from autoglm_compress.quantization.smoothing import Pair, fold

torch.set_num_threads(1)
SCHEMES = [Scheme(4, 32), Scheme(4, -1), Scheme(4, 32, symmetric=False)]


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], torch.device("cpu"))
    for part in inputs.split(50):
        statistics.add(part)
    return statistics


# Input statistics


@pytest.mark.parametrize("block", [24, 1024])
def test_output_error_is_the_change_of_the_outputs(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(input_statistics, "BLOCK", block)
    torch.manual_seed(0)
    inputs, weight = torch.randn(300, 64) + 0.3, torch.randn(40, 64)
    statistics = statistics_of(inputs)
    delta = grid_for(weight, Scheme(4, 32), torch.float32).rounded(weight) - weight
    explicit = (inputs @ delta.T).square().sum()
    torch.testing.assert_close(statistics.output_error(delta), explicit, rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics.absolute, inputs.abs().sum(0))


@pytest.mark.parametrize("block", [24, 1024])
def test_the_gram_matrix_is_whole_and_symmetric(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(input_statistics, "BLOCK", block)
    torch.manual_seed(0)
    inputs, delta = torch.randn(300, 64) + 0.3, torch.randn(5, 64)
    statistics = statistics_of(inputs)
    error = statistics.output_error(delta)
    gram = statistics.whole_gram()
    torch.testing.assert_close(gram, gram.T, rtol=1e-6, atol=0)
    torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(statistics.squares, inputs.square().sum(0))
    assert torch.equal(statistics.output_error(delta), error)


def test_batches_of_rows_are_tokens():
    inputs = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(0))
    rows, flat = InputStatistics(16, torch.device("cpu")), InputStatistics(16, torch.device("cpu"))
    rows.add(inputs.bfloat16())
    flat.add(inputs.bfloat16().float().view(60, 16))
    assert torch.equal(rows.whole_gram(), flat.whole_gram())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_leave_a_mark(value: float):
    statistics = statistics_of(torch.randn(10, 8))
    assert statistics.finite
    inputs = torch.randn(10, 8)
    inputs[3, 5] = value
    statistics.add(inputs)
    assert not statistics.finite


# The scale search


@pytest.mark.parametrize(("rows", "kept"), [(16, 16), (128, 64), (512, 64), (2048, 256), (4096, 512), (27392, 517)])
def test_sampled_rows_cover_the_matrix(rows: int, kept: int):
    sample = sampled_rows(torch.arange(rows).unsqueeze(1))
    assert sample.shape == (kept, 1)
    assert sample[-1] >= rows - rows // 64 - 1


def test_the_identity_is_the_first_candidate():
    torch.manual_seed(0)
    weight, absolute = torch.randn(20, 64), torch.rand(64) * 10
    candidates = list(candidate_scales(absolute, column_importance(weight, 32)))
    assert len(candidates) == 41
    first = candidates[0]
    assert (first.alpha, first.weight_term) == (0, False)
    assert torch.equal(first.scale, torch.ones(64))
    for candidate in candidates:
        assert float(candidate.scale.max() * candidate.scale.min()) == pytest.approx(1, rel=1e-4)


def outstanding() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs of which some channels stand out, and the weights of two linears that read them."""
    torch.manual_seed(0)
    inputs = torch.randn(500, 128)
    inputs[:, ::20] *= 30
    return inputs, [torch.randn(96, 128), torch.randn(32, 128)]


def deltas(readers: list[torch.Tensor], scale: torch.Tensor, scheme: Scheme) -> list[torch.Tensor]:
    """What rounding with scaled columns does to some rows of each weight."""
    rounded = [grid_for(weight * scale, scheme, torch.bfloat16).rounded(weight * scale) / scale for weight in readers]
    return [sampled_rows(after - weight) for after, weight in zip(rounded, readers, strict=True)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_beats_plain_rounding_where_channels_stand_out(scheme: Scheme):
    inputs, readers = outstanding()
    statistics = statistics_of(inputs)
    pair = Pair("norm", ("a", "b"))
    choice = search_scale(readers, statistics.absolute, statistics, pair, scheme, torch.bfloat16)
    assert choice.error < 0.7 * choice.error_rounding
    size = sum(float((inputs @ sampled_rows(weight).T).square().sum()) for weight in readers)

    def explicit(scale: torch.Tensor) -> float:
        return sum(float((inputs @ delta.T).square().sum()) for delta in deltas(readers, scale, scheme)) / size

    assert choice.error == pytest.approx(explicit(choice.candidate.scale), rel=1e-3)
    assert choice.error_rounding == pytest.approx(explicit(torch.ones(128)), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_by_what_error_feedback_leaves(scheme: Scheme):
    inputs, readers = outstanding()
    feedback = feedback_of(inputs.T @ inputs)
    conditional = feedback.conditional
    pair = Pair("norm", ("a", "b"))
    choice = search_scale(readers, inputs.abs().sum(0), feedback, pair, scheme, torch.bfloat16)
    assert choice.error < 0.7 * choice.error_rounding
    size = sum(float(feedback.output_error(sampled_rows(weight))) for weight in readers)

    def explicit(scale: torch.Tensor) -> float:
        return sum(float((delta.square() * conditional).sum()) for delta in deltas(readers, scale, scheme)) / size

    assert choice.error == pytest.approx(explicit(choice.candidate.scale), rel=1e-3)
    assert choice.error_rounding == pytest.approx(explicit(torch.ones(128)), rel=1e-3)
    importance = column_importance(torch.cat([sampled_rows(weight) for weight in readers]), scheme.group_size)
    tried = [explicit(candidate.scale) for candidate in candidate_scales(inputs.abs().sum(0), importance)]
    assert choice.error == pytest.approx(min(tried), rel=1e-3)


@pytest.mark.parametrize("with_feedback", [False, True])
@pytest.mark.parametrize("dead", [8, 64])
def test_search_survives_dead_channels_and_zero_weights(with_feedback: bool, dead: int):
    inputs = torch.randn(100, 64)
    inputs[:, :dead] = 0
    pair, scheme = Pair("norm", ("a",)), Scheme(4, 32)
    statistics = statistics_of(inputs)
    measure = feedback_of(inputs.T @ inputs) if with_feedback else statistics
    for weight in (torch.randn(64, 64), torch.zeros(64, 64)):
        choice = search_scale([weight], statistics.absolute, measure, pair, scheme, torch.bfloat16)
        assert choice.candidate.scale.isfinite().all()
        assert (choice.candidate.scale > 0).all()
        assert choice.error <= choice.error_rounding


def test_scales_are_shared_by_the_query_heads_that_read_a_value_head():
    pair = Pair("v", ("o",), copies=2, block=3)
    per_query = torch.arange(12.0)
    assert pair.averaged(per_query).tolist() == [1.5, 2.5, 3.5, 7.5, 8.5, 9.5]
    assert pair.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


# Folding


def test_folding_is_exact_for_the_gain_as_stored():
    torch.manual_seed(0)
    gain = torch.randn(32).bfloat16()
    gain[3] = 0
    scale = torch.empty(32).uniform_(0.2, 5)
    folded = fold(Pair("norm", ("q",)), scale, gain, torch.bfloat16, None)
    assert folded.grid is None
    assert torch.equal(folded.vector, folded.vector.bfloat16().float())
    torch.testing.assert_close(folded.vector * folded.scale, gain.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(folded.scale, scale, rtol=2**-8, atol=0)


def test_folding_keeps_a_gain_that_would_leave_the_stored_range():
    gain, scale = torch.tensor([1e-6, 1.0, 6e4]), torch.tensor([1e4, 2.0, 0.1])
    folded = fold(Pair("norm", ("q",)), scale, gain, torch.float16, None)
    assert folded.vector.tolist() == pytest.approx([1e-6, 0.5, 6e4])
    assert folded.scale.tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_folding_into_rounded_rows(bias: bool, symmetric: bool):
    torch.manual_seed(0)
    up, inputs, scale = torch.randn(12, 8), torch.randn(20, 8), torch.empty(6).uniform_(0.2, 5)
    vector = torch.randn(12).bfloat16() if bias else None
    grid = grid_for(up, Scheme(4, 4, symmetric), torch.float32)
    integers = grid.integers(up)
    folded = fold(Pair("up", ("down",), first_row=6), scale, vector, torch.bfloat16, grid)

    def activations(grid: Grid, vector: torch.Tensor | None) -> torch.Tensor:
        return inputs @ grid.values(integers, torch.float32).T + (0 if vector is None else vector)

    before, after = activations(grid, vector), activations(folded.grid, folded.vector)
    assert torch.equal(after[:, :6], before[:, :6])
    torch.testing.assert_close(after[:, 6:] * folded.scale, before[:, 6:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.scale, scale, rtol=2**-8, atol=0)
    assert bias or torch.equal(folded.scale, scale)


def test_folding_keeps_rows_whose_scales_would_leave_the_stored_range():
    scales = torch.tensor([[1e-3, 1.0], [1e-3, 1.0], [1.0, 1e3], [1e-6, 1.0]]).half()
    scale = torch.tensor([1e3, 2.0, 1e-2, 0.5])  # 1e-6 would be as imprecise before as after
    folded = fold(Pair("v", ("o",)), scale, None, None, Grid(4, scales, None))
    assert folded.scale.tolist() == [1.0, 2.0, 1.0, 0.5]
    assert torch.equal(folded.grid.scales, (scales.float() / folded.scale.unsqueeze(1)).half())
