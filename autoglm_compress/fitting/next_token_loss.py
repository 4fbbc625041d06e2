"""The divergence between two models' next-token distributions, with gradients, a few tokens at a time.

[tokens, vocab_size] never exists as a whole: the gradient with respect to states and head is made chunk by chunk in
the same pass that measures the loss, so that a vocabulary of 151,552 costs no more memory than a small one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autoglm_compress.forward.logits import logits_of, token_slices
from autoglm_compress.slices import row_slices

UNLABELLED = -1
LEAST_TAIL = 1e-6
"""The least total probability of all tokens beyond the likeliest few. Rounding could make it smaller, even negative."""


class NextTokens(Protocol):
    """The teacher's distributions after each token of a row."""

    def log_probabilities(self, tokens: slice, ours: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [tokens, vocab_size] of some of the tokens, in memory that the caller may change.

        Values that the teacher does not give are taken from `ours`, the student's log-probabilities of the same tokens.
        """

    def at(self, chosen: torch.Tensor) -> "NextTokens":
        """The distributions after some of the tokens, which a mask [tokens] chooses."""


@dataclass(frozen=True)
class FromStates:
    """The teacher's distributions as its normalised final states [tokens, hidden_size] and its head."""

    states: torch.Tensor
    head: torch.Tensor

    def log_probabilities(self, tokens: slice, ours: torch.Tensor) -> torch.Tensor:
        """All of the teacher's."""
        return logits_of(self.states[tokens], self.head).float().log_softmax(-1)

    def at(self, chosen: torch.Tensor) -> "FromStates":
        """Those after some of the tokens."""
        return FromStates(self.states[chosen], self.head)


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens [tokens, k] after each, and their log-probabilities.

    The rest of the probability is spread over all other tokens as the student does. The divergence is then that
    between distributions over the k tokens and "another": a lower bound of the full one, which does not pull towards a
    teacher that is cut off.
    """

    tokens: torch.Tensor
    scores: torch.Tensor

    def log_probabilities(self, tokens: slice, ours: torch.Tensor) -> torch.Tensor:
        """The teacher's for the likeliest, and for the others the student's, scaled to the probability left."""
        ids, scores = self.tokens[tokens].long(), self.scores[tokens].to(ours)
        left = (1 - scores.exp().sum(-1, keepdim=True)).clamp_min(LEAST_TAIL)
        our_left = (1 - ours.gather(-1, ids).exp().sum(-1, keepdim=True)).clamp_min(LEAST_TAIL)
        return (ours + (left / our_left).log()).scatter(-1, ids, scores)

    def at(self, chosen: torch.Tensor) -> "Likeliest":
        """Those after some of the tokens."""
        return Likeliest(self.tokens[chosen], self.scores[chosen])


@torch.no_grad()
def next_token_loss(
    states: torch.Tensor,
    head: torch.Tensor,
    target: NextTokens,
    *,
    labels: torch.Tensor | None = None,
    label_share: float = 0.0,
    states_gradient: torch.Tensor | None = None,
    head_gradient: torch.Tensor | None = None,
) -> float:
    """Mean over tokens of KL(target || ours) in nats, in part replaced by the cross-entropy of the text itself.

    Args:
        states: normalised final states [tokens, hidden_size].
        head: [vocab_size, hidden_size].
        target: the teacher's distributions after the same tokens.
        labels: the token that does come next [tokens], UNLABELLED where none does and the divergence counts alone.
        label_share: the share of the cross-entropy in the loss of a labelled token.
        states_gradient: the gradient with respect to `states` is added to this.
        head_gradient: the gradient with respect to `head` is added to this.
    """
    total = 0.0
    for tokens in token_slices(len(states), len(head)):
        labelled = labels[tokens] if labels is not None and label_share else None
        loss, by_logit = _of_slice(states, head, target, tokens, labelled, label_share)
        total += loss
        if states_gradient is not None or head_gradient is not None:
            by_logit = by_logit.div_(len(states)).to(states.dtype)
        if states_gradient is not None:
            for rows in row_slices(len(head)):
                states_gradient[tokens].addmm_(by_logit[:, rows], head[rows].to(by_logit))
        if head_gradient is not None:
            head_gradient.addmm_(by_logit.T.to(head_gradient), states[tokens].to(head_gradient))
        del by_logit  # or it would be there beside the next slice's logits
    return total / len(states)


def _of_slice(
    states: torch.Tensor,
    head: torch.Tensor,
    target: NextTokens,
    tokens: slice,
    labels: torch.Tensor | None,
    label_share: float,
) -> tuple[float, torch.Tensor]:
    """The sum of some tokens' losses, and its gradient with respect to their logits [tokens, vocab_size].

    Each tensor takes as much as LOGITS_AT_ONCE, so what can be is done in place.
    """
    found = logits_of(states[tokens], head).float().log_softmax(-1)
    expected = target.log_probabilities(tokens, found)
    probability = expected.exp()
    losses = expected.sub_(found).mul_(probability).sum(-1)
    del expected
    if labels is not None:
        losses, probability = _with_labels(losses, probability, found, labels, label_share)
    return float(losses.sum()), found.exp_().sub_(probability)


def _with_labels(
    losses: torch.Tensor, probability: torch.Tensor, found: torch.Tensor, labels: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and target distributions, each mixed with those of the labels."""
    shares = torch.where(labels == UNLABELLED, 0.0, share)
    wanted = labels.clamp_min(0)[:, None]
    losses = (1 - shares) * losses - shares * found.gather(-1, wanted)[:, 0]
    mixed = (1 - shares)[:, None] * probability
    return losses, mixed.scatter_add_(-1, wanted, shares[:, None])


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor, measure: Callable[..., float], target: NextTokens
    ) -> torch.Tensor:
        by_states = torch.zeros_like(states) if states.requires_grad else None
        by_head = torch.zeros_like(head) if head.requires_grad else None
        loss = measure(states, head, target, states_gradient=by_states, head_gradient=by_head)
        ctx.save_for_backward(by_states, by_head)
        return torch.tensor(loss, device=states.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_states, by_head = ctx.saved_tensors
        # In place, because the head's gradient is large. Nothing else holds these tensors.
        scaled = (None if part is None else part.mul_(gradient.to(part)) for part in (by_states, by_head))
        return (*scaled, None, None)


def differentiable_loss(
    states: torch.Tensor, head: torch.Tensor, target: NextTokens, labels: torch.Tensor, label_share: float
) -> torch.Tensor:
    """`next_token_loss` as a scalar that can be sent `backward`."""

    def measure(*args: Any, **gradients: Any) -> float:
        return next_token_loss(*args, labels=labels, label_share=label_share, **gradients)

    if not torch.is_grad_enabled():
        return torch.tensor(measure(states, head, target), device=states.device)
    return _NextTokenLoss.apply(states, head, measure, target)
