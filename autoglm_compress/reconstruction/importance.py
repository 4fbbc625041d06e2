"""Scores of layers, heads, neurons and channels, and the choice of what to keep."""

import torch

from autoglm_compress.reconstruction.lineage import Indices


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
