"""`dynamic_sparse`, an attention function of `transformers`: a step of decoding reads few of the cached tokens.

Attention of several queries at once (a prompt) is dense, by `transformers`' own `sdpa`, and so is that of short
sequences, of sliding windows and of layers without options. Importing this module registers it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from autoglm_compress.attention.cache_layers import KEPT
from autoglm_compress.attention.int8 import restore_states, round_states
from autoglm_compress.attention.kept_states import KeptTensor, PlainTensor, RoundedTensor
from autoglm_compress.attention.selection import attention_mass, attention_scores, select
from autoglm_compress.attention.settings import SCORES, LayerAttention

NAME = "dynamic_sparse"
OPTIONS = "sparse_attention"
"""The attribute of an attention module that has its `LayerAttention`."""


def set_options(model: nn.Module, layer: Callable[[int], LayerAttention]) -> None:
    """Tell each attention module of a model what it reads, by the number of its layer."""
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if number is not None and hasattr(module, "num_key_value_groups"):
            setattr(module, OPTIONS, layer(number))


def dynamic_sparse_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries [batch, heads, queries, head_dim] to keys and values [batch, kv_heads, length, head_dim].

    Args:
        module: the layer's attention, whose options `set_options` has set.
        query: of the tokens that are new.
        key: of all tokens; what a rounded cache returned has the integers as an attribute.
        value: of all tokens.
        attention_mask: bool, True where a query sees a token, or additive; [batch, 1 or heads, queries, length]. None:
            all that came before.
        scaling: of dot products; 1 / sqrt(head_dim) if None.
        kwargs: what else `transformers` gives to its attention functions.

    Returns:
        [batch, queries, heads, head_dim], and None for the weights.
    """
    layer: LayerAttention | None = getattr(module, OPTIONS, None)
    keys, values = getattr(key, KEPT, None) or (PlainTensor(key), PlainTensor(value))
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if layer is not None and not module.training:
        sparse = kwargs.get("sliding_window") is None and (attention_mask is None or attention_mask.shape[1] == 1)
        if layer.every_query:
            if layer.options.kv_bits == 8:
                key, value = (restore_states(round_states(each), each.dtype) for each in (key, value))
            if sparse and layer.top_k is not None:
                return _every_query(layer, query, key, value, attention_mask, scaling), None
            keys, values = PlainTensor(key), PlainTensor(value)
        elif sparse and query.shape[2] == 1:
            chosen = layer if _reads_less(layer, key.shape[2]) else None
            return _step(chosen, query, keys, values, key.shape[1], attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, keys.whole(), values.whole(), attention_mask, scaling=scaling, **kwargs
    )


def _reads_less(layer: LayerAttention, length: int) -> bool:
    return length >= layer.options.dense_below and layer.tokens_read(length) < length


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask or a bool one as a bool one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _step(
    layer: LayerAttention | None,
    query: torch.Tensor,
    keys: KeptTensor,
    values: KeptTensor,
    kv_heads: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The attention [batch, 1, heads, head_dim] of one query in each row: to everything without a layer's options."""
    visible = None if mask is None else _visible(mask)
    if isinstance(keys, RoundedTensor) and isinstance(values, RoundedTensor):
        return _rounded_step(layer, query, keys, values, kv_heads, visible, scaling)
    if layer is None:
        return _whole_step(query, keys.whole(), values.whole(), visible, scaling)
    places, read = select(attention_mass(attention_scores(query, keys, kv_heads, scaling, visible)), visible, layer)
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype  # CPUs have few instructions for 16 bits
    few_keys, few_values = (part.gather(places[:, :, 0]).to(dtype) for part in (keys, values))
    return _whole_step(query.to(dtype), few_keys, few_values, read, scaling).to(query.dtype)


def _whole_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The heads of a group are rows of one product, which `scaled_dot_product_attention` does not do."""
    grouped = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    return scaled_dot_product_attention(grouped, key, value, attn_mask=visible, scale=scaling).flatten(1, 2)[:, None]


def _rounded_step(
    layer: LayerAttention | None,
    query: torch.Tensor,
    keys: RoundedTensor,
    values: RoundedTensor,
    kv_heads: int,
    visible: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The same of a rounded cache, whose integers are read as they are. The scores that choose are those that weigh."""
    scores = attention_scores(query, keys, kv_heads, scaling, visible)[:, :, :, 0]
    if layer is not None:
        places, counts = select(attention_mass(scores[:, :, :, None]), visible, layer)
        scores = scores.gather(-1, places.expand(*scores.shape[:3], -1))
        if counts is not None:
            scores = scores.masked_fill(~counts, torch.finfo(scores.dtype).min)
        values = values.part(places[:, :, 0])
    return values.sums(scores.softmax(-1)).to(query.dtype).flatten(1, 2)[:, None]


def _every_query(
    layer: LayerAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The attention [batch, queries, heads, head_dim] of many queries, each reading what it would if decoded alone."""
    batch, heads, count, _ = query.shape
    kv_heads, length = key.shape[1:3]
    lengths = torch.arange(length - count + 1, length + 1, device=query.device)
    visible = lengths[:, None] > torch.arange(length, device=query.device) if mask is None else _visible(mask)
    visible = visible.expand(batch, 1, count, length)
    dense = (lengths < layer.options.dense_below)[:, None]
    keys, values = (each.repeat_interleave(heads // kv_heads, 1) for each in (key, value))
    found = []
    at_once = max(1, SCORES // (batch * heads * length))
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        seen = visible[:, :, part]
        scores = attention_scores(query[:, :, part], PlainTensor(key), kv_heads, scaling, seen)
        selected = select(attention_mass(scores), seen, layer)
        assert selected.counts is not None
        read = torch.zeros(*selected.places.shape[:3], length, dtype=torch.bool, device=query.device)
        read = read.scatter_(-1, selected.places, selected.counts) | (seen & dense[part])
        read = read.repeat_interleave(heads // kv_heads, 1)
        found.append(scaled_dot_product_attention(query[:, :, part], keys, values, attn_mask=read, scale=scaling))
    return torch.cat(found, 2).transpose(1, 2)


AttentionInterface.register(NAME, dynamic_sparse_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
