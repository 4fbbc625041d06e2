"""The loss of healing, in chunks and with gradients of its own, against what autograd makes of all logits."""

import pytest
import torch
from torch import nn

from autoglm_compress.fitting.next_token_loss import (
    UNLABELLED,
    FromStates,
    Likeliest,
    differentiable_loss,
    next_token_loss,
)
from autoglm_compress.forward import logits

TOKENS, VOCABULARY = 10, 20


@pytest.fixture(autouse=True)
def _three_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logits, "LOGITS_AT_ONCE", 3 * VOCABULARY)
    torch.manual_seed(0)


@pytest.fixture
def student() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(TOKENS, 4, requires_grad=True), torch.randn(VOCABULARY, 4, requires_grad=True)


@pytest.fixture
def teacher() -> FromStates:
    return FromStates(torch.randn(TOKENS, 6), torch.randn(VOCABULARY, 6).bfloat16())


def probabilities(teacher: FromStates) -> torch.Tensor:
    return (teacher.states @ teacher.head.float().T).softmax(-1)


def assert_same(student: tuple[torch.Tensor, ...], loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(
        torch.autograd.grad(3 * loss, student), torch.autograd.grad(3 * expected, student), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def no_labels() -> torch.Tensor:
    return torch.full((TOKENS,), UNLABELLED)


def test_divergence_and_gradients_are_those_of_all_logits(student: tuple[torch.Tensor, ...], teacher: FromStates):
    found = (student[0] @ student[1].T).log_softmax(-1)
    expected = nn.functional.kl_div(found, probabilities(teacher), reduction="batchmean")
    assert_same(student, differentiable_loss(*student, teacher, no_labels(), 0.0), expected)
    assert next_token_loss(*student, teacher) == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_takes_its_share_where_a_token_follows(student: tuple[torch.Tensor, ...], teacher: FromStates):
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[3] = UNLABELLED
    found = (student[0] @ student[1].T).log_softmax(-1)
    divergences = nn.functional.kl_div(found, probabilities(teacher), reduction="none").sum(-1)
    entropies = nn.functional.nll_loss(found, labels, ignore_index=UNLABELLED, reduction="none")
    expected = torch.where(labels == UNLABELLED, divergences, 0.75 * divergences + 0.25 * entropies).mean()
    assert_same(student, differentiable_loss(*student, teacher, labels, 0.25), expected)


def test_the_likeliest_tokens_and_the_rest_as_one(student: tuple[torch.Tensor, ...], teacher: FromStates):
    top = probabilities(teacher).topk(5)
    target = Likeliest(top.indices.int(), top.values.log())
    found = (student[0] @ student[1].T).softmax(-1)
    kept = found.gather(-1, top.indices)
    ours = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    theirs = torch.cat([top.values, 1 - top.values.sum(-1, keepdim=True)], -1)
    expected = nn.functional.kl_div(ours.log(), theirs, reduction="batchmean")
    assert_same(student, differentiable_loss(*student, target, no_labels(), 0.0), expected)


def test_all_tokens_but_one_among_the_likeliest_are_the_whole_distribution(
    student: tuple[torch.Tensor, ...], teacher: FromStates
):
    top = probabilities(teacher).topk(VOCABULARY - 1)
    target = Likeliest(top.indices.int(), top.values.log())
    assert next_token_loss(*student, target) == pytest.approx(next_token_loss(*student, teacher), rel=1e-4)
