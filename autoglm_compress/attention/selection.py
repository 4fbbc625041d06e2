"""Which of the cached tokens a query reads: those that its KV group attends to most, the last ones and the first."""

from typing import NamedTuple

import torch

from autoglm_compress.attention.kept_states import KeptTensor
from autoglm_compress.attention.settings import FIRST, LayerAttention

ALWAYS = torch.inf
NEVER = -1.0


class Selected(NamedTuple):
    """The places [batch, kv_heads, queries, n] of tokens, and which of them count (None: all)."""

    places: torch.Tensor
    counts: torch.Tensor | None


def attention_scores(
    queries: torch.Tensor, keys: KeptTensor, kv_heads: int, scaling: float, visible: torch.Tensor | None
) -> torch.Tensor:
    """The scores that attention takes the softmax of.

    Args:
        queries: [batch, heads, queries, head_dim].
        keys: of `kv_heads` heads; integers are read as they are.
        kv_heads: each serves as many query heads.
        scaling: of the dot products.
        visible: which tokens a query may see, bool [batch, 1, queries, length]; None for all.

    Returns:
        fp32 [batch, kv_heads, heads / kv_heads, queries, length].
    """
    batch, heads, count, width = queries.shape
    products = keys.products(queries.reshape(batch, kv_heads, heads // kv_heads * count, width))
    scores = (products * scaling).float().unflatten(2, (heads // kv_heads, count))
    if visible is None:
        return scores
    return scores.masked_fill(~visible[:, :, None], torch.finfo(scores.dtype).min)  # finite: padding sees nothing


def attention_mass(scores: torch.Tensor) -> torch.Tensor:
    """What the query heads of each KV group give to each token, as a sum of their softmaxes.

    Args:
        scores: [batch, kv_heads, heads / kv_heads, queries, length].

    Returns:
        [batch, kv_heads, queries, length].
    """
    return scores.softmax(-1).sum(2)


def select(mass: torch.Tensor, visible: torch.Tensor | None, layer: LayerAttention) -> Selected:
    """The tokens to read, of which every query has as many as its number of visible tokens gives it.

    Args:
        mass: as `attention_mass` gives it; it is changed in place.
        visible: bool [batch, 1, queries, length]; None if there is one query, which sees all.
        layer: how many to read.
    """
    length, window = mass.shape[-1], layer.options.window
    if visible is None:
        mass[..., -window:] = ALWAYS
        mass[..., :FIRST] = ALWAYS
        return Selected(mass.topk(min(layer.tokens_read(length), length), sorted=False).indices, None)
    from_first = visible.cumsum(-1)
    seen = from_first[..., -1:]
    always = (from_first <= FIRST) | (seen - from_first < window)
    mass = mass.masked_fill(always, ALWAYS).masked_fill(~visible, NEVER)
    most = layer.tokens_read(seen)
    values, places = mass.topk(min(int(most.max()), length))
    ranks = torch.arange(places.shape[-1], device=places.device)
    return Selected(places, (values > NEVER) & (ranks < most))
