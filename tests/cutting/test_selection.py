"""Which directions and channels of the residual stream are kept."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from autoglm_compress.cutting.importance import choose_channels
from autoglm_compress.cutting.rotation import principal_directions, reader_directions
from support.models import build_model, silence_channels
from support.running import compress, invoke, load, logits, write_recipe

CALIBRATION = {"source": "python-docs", "samples": 16, "sequence_length": 64}


def reader_loss(gram: torch.Tensor, metric: torch.Tensor, kept: torch.Tensor) -> float:
    """What readers lose when x is predicted by least squares from kept^T x, kept being [size, count]."""
    cross = gram @ kept
    left = gram - cross @ torch.linalg.pinv(kept.T @ cross) @ cross.T
    return float((metric * left).sum())


def problem(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    readers = torch.randn(size // 2 + 1, size, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x), readers.T @ readers


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 5))
def test_reader_directions_are_orthonormal_and_lose_less_than_any_others(seed: int, keep: int):
    gram, metric = problem(seed, 6)
    basis = reader_directions(gram, metric, keep).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(keep, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    loss = reader_loss(gram, metric, basis)
    # Eckart and Young: no map to so many numbers can lose less than the eigenvalues left out.
    values = torch.linalg.eigvals(metric @ gram).real.sort(descending=True).values
    assert loss == pytest.approx(float(values[keep:].sum()), rel=1e-4, abs=1e-5 * float(values.sum()))
    assert loss <= reader_loss(gram, metric, principal_directions(gram, keep).double()) + 1e-6 * float(values.sum())


def test_with_all_readers_alike_reader_directions_are_the_principal_ones():
    gram, _ = problem(1, 8)
    by_readers, principal = reader_directions(gram, torch.eye(8), 3), principal_directions(gram, 3)
    torch.testing.assert_close(by_readers @ by_readers.T, principal @ principal.T, rtol=1e-4, atol=1e-4)


def test_directions_that_nobody_reads_and_channels_that_are_dead_do_no_harm():
    gram, metric = problem(2, 8)
    gram[:, 7] = gram[7] = 0
    metric[:, :3] = metric[:3] = 0
    basis = reader_directions(gram, metric, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=1e-5, atol=1e-5)
    assert reader_loss(gram, metric, basis.double()) == pytest.approx(0, abs=1e-6)
    assert choose_channels(gram, metric, 4) == (3, 4, 5, 6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 5))
def test_channels_are_removed_one_by_one_by_what_it_costs_the_readers(seed: int, keep: int):
    gram, metric = problem(seed, 6)
    present = list(range(6))
    while len(present) > keep:
        candidates = list(combinations(present, len(present) - 1))
        losses = [reader_loss(gram, metric, torch.eye(6, dtype=torch.float64)[:, list(kept)]) for kept in candidates]
        present = list(candidates[losses.index(min(losses))])
    assert choose_channels(gram, metric, keep) == tuple(present)


@pytest.mark.parametrize("method", ["readers", "pca", "least_squares"])
def test_a_tied_model_of_which_nothing_is_lost_stays_as_it_is(
    method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    # Eight of the 64 channels carry nothing, and all gains of the final norm are the same.
    model = build_model("llama", tie_word_embeddings=True).float()
    silence_channels(model, 56)
    torch.nn.init.constant_(model.model.norm.weight, 1.5)
    source = tmp_path / "source"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    stage = {"stage": "width", "hidden_size": 56, "method": method}
    result = load(compress(tmp_path, source, stage, calibration=CALIBRATION))
    assert result.config.tie_word_embeddings
    tokens = torch.arange(40)[None] * 7 % 512
    torch.testing.assert_close(logits(result, tokens), logits(model, tokens), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["readers", "pca"])
def test_a_stream_behind_norms_cannot_be_turned(method: str, tmp_path: Path, make_checkpoint: Callable[..., Path]):
    stages = [{"stage": "width", "hidden_size": 48, "method": method}]
    result = invoke("plan", write_recipe(tmp_path, make_checkpoint("glm4"), stages))
    assert result.exit_code == 2
    assert "use least_squares" in result.output
