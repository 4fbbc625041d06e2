"""Muon: its steps are those of the plain algorithm, one matrix at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoglm_compress.healing import muon
from autoglm_compress.healing.muon import Muon, orthogonalized


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int, scale: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, min(rows, columns), generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    values = torch.linspace(1, 3, min(rows, columns), dtype=torch.float64)
    matrix = scale * left * values @ right.T
    inside = left.T @ orthogonalized(matrix[None])[0] @ right
    assert (inside.diagonal() > 0.6).all()
    assert (inside.diagonal() < 1.3).all()
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-6, rtol=0)
    torch.testing.assert_close(left @ inside @ right.T, orthogonalized(matrix[None])[0], atol=1e-6, rtol=0)


def test_a_gradient_of_zero_is_no_step():
    assert (orthogonalized(torch.zeros(2, 3, 5)) == 0).all()


@pytest.mark.parametrize("stacked", [muon.STACKED, 1], ids=["stacked", "one by one"])
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, stacked: int):
    monkeypatch.setattr(muon, "STACKED", stacked)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(8, 12), (12, 8), (8, 12), (6, 6)]]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    unused = nn.Parameter(torch.ones(2, 2))
    mine = Muon([*ours, unused], lr=0.05, momentum=0.9, weight_decay=0.1)
    plain = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradients = [torch.randn_like(matrix) for matrix in start]
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        mine.step()
        plain.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(one - before, other - before, atol=2e-3, rtol=2e-2)  # torch's are in bf16
    assert (unused == 1).all()
