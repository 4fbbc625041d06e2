"""Scores of layers, heads, neurons and channels, and the choice of what to keep."""

import torch

from autoglm_compress.cutting.lineage import Indices

CHANNEL_DAMPING = 1e-6
"""Added to a Gram matrix, relative to its mean diagonal, so that it has an inverse where channels are dead."""


def top(scores: torch.Tensor, count: int) -> Indices:
    """The indices of the `count` highest scores, in ascending order; of equal scores the first is kept."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def choose_heads(scores: torch.Tensor, groups: int, keep_heads: int, keep_groups: int) -> tuple[Indices, Indices]:
    """Query heads and KV heads to keep, with as many query heads in every KV group that stays.

    Args:
        scores: [num_attention_heads], the query heads of a KV group standing together.
        groups: num_key_value_heads.
        keep_heads: query heads to keep in all; a multiple of keep_groups.
        keep_groups: KV heads to keep, those whose best query heads score highest together.
    """
    per_group = keep_heads // keep_groups
    grouped = scores.view(groups, -1)
    kept_groups = top(grouped.topk(per_group, dim=1).values.sum(1), keep_groups)
    size = grouped.shape[1]
    heads = tuple(group * size + head for group in kept_groups for head in top(grouped[group], per_group))
    return heads, kept_groups


def random_scores(count: int, seed: int, layer: int) -> torch.Tensor:
    """Scores [count] without meaning, the same for the same seed and layer."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed * 100_003 + layer))


def choose_channels(gram: torch.Tensor, metric: torch.Tensor, keep: int) -> Indices:
    """Channels from which linear readers lose least, once they are fitted to the channels that are left.

    Optimal brain surgery on channels: with the removed ones R predicted from the others as well as can be, the loss is
    trace(M_RR cov(x_R given the others)), and cov is the inverse of the block P_RR of P = G^-1. The channel that adds
    least to it goes, one after the other. Each step updates, for every channel, its Schur complement in P, the error d
    that removing it next would make, and the loss d^T M d of it.

    Args:
        gram: G, mean of x x^T over tokens, [hidden_size, hidden_size].
        metric: M, mean of W^T W over readers W, [hidden_size, hidden_size].
        keep: how many channels to keep.
    """
    gram, metric = gram.double(), metric.double()
    size = len(gram)
    damped = gram + CHANNEL_DAMPING * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    precision = torch.linalg.inv(damped)
    errors = torch.eye(size, dtype=gram.dtype)
    losses = metric.diagonal().clone()
    gone = torch.zeros(size, dtype=torch.bool)
    for _ in range(size - keep):
        added = losses / precision.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
        channel = int(added.masked_fill(gone, torch.inf).argmin())
        gone[channel] = True
        row, error = precision[channel] / precision[channel, channel], errors[:, channel].clone()
        row[gone] = 0
        losses += row * (row * losses[channel] - 2 * ((metric @ error) @ errors))
        errors -= torch.outer(error, row)
        precision -= torch.outer(precision[:, channel].clone(), row)
    return tuple(torch.nonzero(~gone).flatten().tolist())
