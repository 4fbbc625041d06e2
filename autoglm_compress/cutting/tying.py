"""One matrix instead of two: an embedding that is also the head, with the final norm's gain that fits it.

The shared matrix S is a combination of embedding E and head W, S = E P + W R, so that the search for it works on
[hidden_size, hidden_size] matrices, whatever the vocabulary.
"""

from dataclasses import dataclass

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.slices import SLICE_ROWS, row_slices

ROUNDS = 4
OUTPUT_WEIGHT = 3.0
"""How much logits count against the embedding.

A later refit or healing corrects wrong logits in the last layers. A wrong embedding reaches all layers and loses what
they know.
"""


@dataclass(frozen=True)
class PairMoments:
    """Means [hidden_size] over the vocabulary of E and W, and E^T E, E^T W, W^T W without them, in fp64."""

    embedding_mean: torch.Tensor
    head_mean: torch.Tensor
    embedding_gram: torch.Tensor
    cross: torch.Tensor
    head_gram: torch.Tensor


@dataclass(frozen=True)
class Tied:
    """S = mean + (E - mean of E) P + (W - mean of W) R, and the gain [hidden_size] of the norm before it."""

    from_embedding: torch.Tensor
    from_head: torch.Tensor
    gain: torch.Tensor
    input_error: float
    output_error: float

    def matrix(self, embedding: torch.Tensor, head: torch.Tensor, moments: PairMoments) -> torch.Tensor:
        """S [vocab_size, hidden_size] in the embedding's dtype."""
        shared = torch.empty_like(embedding)
        for rows in row_slices(len(embedding)):
            from_embedding = (embedding[rows].double() - moments.embedding_mean) @ self.from_embedding
            from_head = (head[rows].double() - moments.head_mean) @ self.from_head
            shared[rows] = (from_embedding + from_head + moments.embedding_mean).to(shared.dtype)
        return shared


def tying_memory(shape: ModelShape) -> int:
    """Bytes of both matrices, and of the search for the new one or of making it, in fp64.

    The search has five moments and a few products of each with what is searched; the new matrix is made a slice of
    rows at a time, of which there are four.
    """
    pair, square = shape.vocab_size * shape.hidden_size * shape.element_bytes, 8 * shape.hidden_size**2
    slices = 4 * 8 * min(SLICE_ROWS, shape.vocab_size) * shape.hidden_size
    return 2 * pair + max(16 * square, pair + slices + 6 * square)


def pair_moments(embedding: torch.Tensor, head: torch.Tensor) -> PairMoments:
    """The moments of an embedding and a head, both [vocab_size, hidden_size]."""
    count, size = embedding.shape
    sums = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
    products = [torch.zeros(size, size, dtype=torch.float64) for _ in range(3)]
    for rows in row_slices(count):
        pair = embedding[rows].double(), head[rows].double()
        for total, part in zip(sums, pair, strict=True):
            total += part.sum(0)
        for total, (left, right) in zip(products, ((0, 0), (0, 1), (1, 1)), strict=True):
            total += pair[left].T @ pair[right]
    means = [total / count for total in sums]
    for total, (left, right) in zip(products, ((0, 0), (0, 1), (1, 1)), strict=True):
        total -= count * torch.outer(means[left], means[right])
    return PairMoments(*means, *products)


def tie_least_squares(moments: PairMoments, gain: torch.Tensor, gram: torch.Tensor, output_weight: float) -> Tied:
    """The shared matrix S, as large as the embedding, and the gain g that serve both ends best.

    Lowers |S - E|^2 / |E|^2 + output_weight * |logits' - logits|^2 / |logits|^2 by turns over S and g. Logits are
    S diag(g) x and W diag(gain) x for normalised final states x, without their mean over the vocabulary, which a
    softmax does not see; so the mean of S is the embedding's. S is kept at the embedding's norm, since S / c and c g
    give the same logits: without that the best S is almost zero.

    Args:
        moments: of E and W.
        gain: the final norm's gain before, [hidden_size].
        gram: mean of x x^T, [hidden_size, hidden_size].
        output_weight: how much the logits count against the embedding.
    """
    gain, gram = gain.double(), gram.double()
    # All in terms of the head as it multiplies x, its gain included.
    cross, head_gram = moments.cross * gain, gain[:, None] * moments.head_gram * gain
    embedding_gram = moments.embedding_gram
    input_scale = 1 / embedding_gram.trace()
    output_scale = output_weight / (head_gram * gram).sum()
    from_embedding, from_head = torch.eye(len(gram), dtype=torch.float64), torch.zeros_like(gram)

    def best_gain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """S^T S, S^T W, and the gain that solves the normal equations ((S^T S) * G) g = diag(S^T W G)."""
        half = cross.T @ from_embedding + head_gram @ from_head
        square = from_embedding.T @ (embedding_gram @ from_embedding + cross @ from_head) + from_head.T @ half
        solved = torch.linalg.lstsq(square * gram, (half * gram).sum(0)[:, None]).solution[:, 0]
        return square, half.T, solved

    square, shared_head, found = best_gain()
    for _ in range(ROUNDS):
        system = output_scale * found[:, None] * gram * found
        system.diagonal().add_(input_scale)
        factor = torch.linalg.cholesky(system)
        from_embedding = torch.cholesky_inverse(factor) * input_scale
        from_head = torch.cholesky_solve(output_scale * found[:, None] * gram, factor).T
        square, _, _ = best_gain()
        longer = (embedding_gram.trace() / square.trace()).sqrt()
        from_embedding, from_head = longer * from_embedding, longer * from_head
        square, shared_head, found = best_gain()
    with_embedding = (from_embedding.T @ embedding_gram + from_head.T @ cross.T).trace()
    output_square = ((found[:, None] * square * found - 2 * found[:, None] * shared_head + head_gram) * gram).sum()
    return Tied(
        from_embedding=from_embedding,
        from_head=gain[:, None] * from_head,
        gain=found.float(),
        input_error=float((square.trace() - 2 * with_embedding + embedding_gram.trace()) * input_scale),
        output_error=float(output_square / (head_gram * gram).sum()),
    )
