"""One matrix in place of two: an embedding that is also a head, and the final norm's gain that makes it one."""

import torch

ROUNDS = 4


def tie_least_squares(
    embedding: torch.Tensor, head: torch.Tensor, gram: torch.Tensor, output_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared matrix S and gain g with S close to the embedding and S diag(g) to the head, by least squares.

    Minimises |S - E|^2 / |E|^2 + output_weight * |logits' - logits|^2 / |logits|^2 by turns over S and g, the logits
    being those of normalised final states, without their mean over the vocabulary, which a softmax does not see.

    Args:
        embedding: E [vocab_size, hidden_size].
        head: what multiplies the normalised final state, gain included, [vocab_size, hidden_size].
        gram: mean of x x^T [hidden_size, hidden_size] over normalised final states x.
        output_weight: how much the logits count against the embedding.

    Returns:
        S [vocab_size, hidden_size] and g [hidden_size].
    """
    # Only what is left without their means must serve both; the mean of S is the embedding's alone.
    mean, embedding, head = embedding.mean(0), embedding - embedding.mean(0), head - head.mean(0)
    target = head @ gram
    input_scale = 1 / (embedding + mean).square().sum()
    output_scale = output_weight / (target * head).sum()
    shared, gain = embedding, _best_gain(embedding, target, gram)
    for _ in range(ROUNDS):
        system = output_scale * gain[:, None] * gram * gain
        system.diagonal().add_(input_scale)
        factor = torch.linalg.cholesky(system)
        shared = torch.cholesky_solve((input_scale * embedding + output_scale * target * gain).T, factor).T
        gain = _best_gain(shared, target, gram)
    return shared + mean, gain


def _best_gain(shared: torch.Tensor, target: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The gain [hidden_size] with which S comes closest to the head; `target` is the head times the Gram matrix.

    Solves the normal equations ((S^T S) * G) g = diag(S^T W G).
    """
    system = (shared.T @ shared) * gram
    return torch.linalg.lstsq(system.double(), (shared * target).sum(0).double()[:, None]).solution[:, 0].float()
