"""Sparse attention against an obvious slow version, against dense attention, and in whole models."""

from shutil import which
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicCache

from autoglm_compress.attention import SparseAttention, dynamic_sparse
from autoglm_compress.attention.cache_layers import KEPT, PreallocatedLayer
from autoglm_compress.attention.dynamic_sparse import OPTIONS, dynamic_sparse_attention
from autoglm_compress.attention.int8 import Rounded, round_states
from autoglm_compress.attention.kept_states import RoundedTensor
from autoglm_compress.attention.layout import gather
from autoglm_compress.attention.native import native_products
from autoglm_compress.attention.settings import AttentionOptions, LayerAttention
from support.models import build_model

WIDTH = 8


def _module(layer: LayerAttention, groups: int) -> nn.Module:
    module = nn.Module().eval()
    module.num_key_value_groups = groups
    setattr(module, OPTIONS, layer)
    return module


def _slowly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, layer: LayerAttention
) -> torch.Tensor:
    """Attention [batch, 1, heads, width] of one query in each row, a row, group and head at a time."""
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    found = torch.zeros(batch, 1, heads, width)
    for row in range(batch):
        places = [place for place in range(key.shape[2]) if visible[row, place]]
        for kv_head in range(key.shape[1]):
            keys, values = key[row, kv_head, places], value[row, kv_head, places]
            queries = query[row, kv_head * groups : (kv_head + 1) * groups, 0]
            mass = torch.stack([(keys @ each / width**0.5).softmax(0) for each in queries]).sum(0)
            window = layer.options.window
            always = {0, *range(max(len(places) - window, 0), len(places))}
            top_k = layer.top_k * max(1, len(places) / 1024 if layer.options.adaptive else 1)
            others = sorted(set(range(len(places))) - always, key=lambda place: -float(mass[place]))
            chosen = sorted(always | set(others[: int(top_k) + window + 1 - len(always)]))
            for number, each in enumerate(queries):
                weights = (keys[chosen] @ each / width**0.5).softmax(0)
                found[row, 0, kv_head * groups + number] = weights @ values[chosen]
    return found


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    length=st.integers(1, 60),
    padding=st.integers(0, 20),
    top_k=st.integers(1, 40),
    window=st.integers(1, 20),
    kv_bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_a_step_reads_what_the_slow_version_reads(
    heads: tuple[int, int], length: int, padding: int, top_k: int, window: int, kv_bits: int, seed: int
) -> None:
    padding = min(padding, length - 1)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads[0], 1, WIDTH, generator=generator) * 2
    key, value = torch.randn(2, 2, heads[1], length, WIDTH, generator=generator)
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[1, :padding] = False
    layer = LayerAttention(top_k, AttentionOptions(window=window, dense_below=0))
    cache = PreallocatedLayer(kv_bits, as_kept=True)
    handed = cache.update(key, value)

    module = _module(layer, heads[0] // heads[1])
    found, _ = dynamic_sparse_attention(module, query, *handed, visible[:, None, None])
    alone, _ = dynamic_sparse_attention(module, query[:1], *(each[:1] for each in (key, value)), None)

    torch.testing.assert_close(found, _slowly(query, cache.keys, cache.values, visible, layer), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, _slowly(query[:1], key[:1], value[:1], visible[:1], layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_reading_everything_is_dense_attention(
    heads: tuple[int, int], dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or it would not even select.
    monkeypatch.setattr(dynamic_sparse, "_reads_less", lambda layer, _: layer.top_k is not None)
    query = torch.randn(2, heads[0], 1, WIDTH, dtype=dtype)
    key, value = torch.randn(2, 2, heads[1], 50, WIDTH, dtype=dtype)
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[1, ..., :7] = False
    module = _module(LayerAttention(50, AttentionOptions(dense_below=0)), heads[0] // heads[1])

    everything = _module(LayerAttention(None, AttentionOptions()), heads[0] // heads[1])
    rounded = PreallocatedLayer(8, as_kept=True)
    handed = rounded.update(key, value)
    for each in (mask, torch.where(mask, 0, torch.finfo(dtype).min).to(dtype), None):
        for states, held in (((key, value), (key, value)), (handed, (rounded.keys, rounded.values))):
            expected, _ = dynamic_sparse.sdpa_attention_forward(module, query, *held, each)
            for reading in (module, everything):
                found, _ = dynamic_sparse_attention(reading, query, *states, each)
                torch.testing.assert_close(found, expected, atol=near, rtol=near)


@given(shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 600), st.integers(1, 70)), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_compiled_products_are_those_of_torch(shape: tuple[int, ...], seed: int) -> None:
    batch, heads, rows, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    queries, states = (torch.randn(batch, heads, n, width, generator=generator) for n in (rows, length))
    cache = PreallocatedLayer(8, as_kept=True)
    keys, _ = cache.update(states, states)
    kept, _ = getattr(keys, KEPT)
    weights = torch.rand(batch, heads, rows, length, generator=generator)

    with patch("autoglm_compress.attention.native._compiled", lambda: None):
        expected = kept.products(queries), kept.sums(weights)
    torch.testing.assert_close((kept.products(queries), kept.sums(weights)), expected, atol=1e-4, rtol=1e-5)


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 20), st.integers(1, 5)),
    room=st.integers(0, 3),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_whole_rows_are_those_that_torch_gathers(sizes: tuple[int, ...], room: int, turned: bool, seed: int) -> None:
    batch, heads, length, width = sizes
    generator = torch.Generator().manual_seed(seed)
    first, second = (length + room, heads) if turned else (heads, length + room)
    memory = torch.randn(batch, first, second, width, generator=generator)
    tensor = (memory.transpose(1, 2) if turned else memory)[:, :, room:]
    places = torch.randint(length, (batch, heads, 4), generator=generator)

    expected = tensor.gather(2, places[..., None].expand(-1, -1, -1, width))
    assert torch.equal(gather(tensor, places), expected)


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_a_compiler_is_used_where_there_is_one() -> None:
    states = torch.randn(1, 2, 20, 8)

    found = native_products(states, round_states(states))

    assert found is not None
    torch.testing.assert_close(found, states @ states.transpose(-1, -2), atol=0.2, rtol=0.02)
    assert native_products(states, Rounded(*(part[..., ::2, :] for part in round_states(states)))) is None


def _sparse(layers: int, **changes: Any) -> SparseAttention:
    return SparseAttention(**({"top_k": (6,) * layers, "window": 3, "dense_below": 0} | changes))


@torch.no_grad()
@pytest.mark.parametrize(("family", "kv_bits"), [("glm", 8), ("qwen3", 16), ("mistral", 16)])
def test_one_pass_for_measuring_predicts_what_decoding_does(family: str, kv_bits: int, tokens: torch.Tensor) -> None:
    model, attention = build_model(family).float(), _sparse(4, dense_below=12, kv_bits=kv_bits)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    dense = model(tokens, attention_mask=mask).logits[:, -8:]
    steps, cache = [], attention.apply(model)
    for place in range(tokens.shape[1]):
        part = tokens[:, place : place + 1]
        steps.append(model(part, attention_mask=mask[:, : place + 1], past_key_values=cache).logits)
    decoded = torch.cat(steps, 1)[:, -8:]

    dynamic_sparse.set_options(model, lambda layer: attention.layer(layer, every_query=True))
    found = model(tokens, attention_mask=mask, use_cache=False).logits[:, -8:]

    assert cache.layers[0].get_seq_length() == tokens.shape[1]
    if kv_bits == 16:
        torch.testing.assert_close(found, decoded, atol=1e-4, rtol=1e-4)
    assert (found - decoded).abs().mean() < 1e-3  # some integers differ by one, as the states do in their last bits
    if family != "mistral":  # all its layers have a window
        assert (found - dense).abs().mean() > 0.01


@torch.no_grad()
def test_generation_in_turns_is_that_of_a_plain_cache_where_all_is_read(tokens: torch.Tensor) -> None:
    model, settings = build_model("qwen3").float(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = model.generate(tokens[:, :12], past_key_values=DynamicCache(config=model.config), **settings)
    second = torch.cat([first, tokens[:, :7]], 1)
    expected = model.generate(second, past_key_values=DynamicCache(config=model.config), **settings)

    cache = _sparse(4, top_k=(64,) * 4, kv_bits=16).apply(model)
    assert torch.equal(model.generate(tokens[:, :12], past_key_values=cache, **settings), first)
    assert torch.equal(model.generate(second, past_key_values=cache, **settings), expected)
    assert torch.equal(model.generate(second, **settings), expected)  # with transformers' own cache


def test_integers_that_another_attention_reads_are_not_numbers(tokens: torch.Tensor) -> None:
    model = build_model("glm")
    cache = _sparse(4).apply(model)
    model.set_attn_implementation("sdpa")

    assert model(tokens, past_key_values=cache).logits.isnan().all()


def _needle_found(length: int, depth: int) -> bool:
    """Whether a step finds the one token whose key is the query's, among many that are not."""
    generator = torch.Generator().manual_seed(length + depth)
    key = torch.randn(1, 2, length, 32, generator=generator)
    query = torch.randn(1, 4, 1, 32, generator=generator)
    key[0, :, depth] = 2 * query[0, ::2, 0]
    value = torch.zeros_like(key)
    value[0, :, depth] = 1
    cache = PreallocatedLayer(8, as_kept=True)
    layer = LayerAttention(8, AttentionOptions(dense_below=0))
    found, _ = dynamic_sparse_attention(_module(layer, 2), query, *cache.update(key, value), None)
    return bool(found[0, 0, ::2].mean() > 0.5)


def test_a_needle_is_found_at_every_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(length, int(length * depth)) for length in (200, 1000) for depth in (0.1, 0.5, 0.8)]
    assert all(_needle_found(*place) for place in places)

    monkeypatch.setattr(RoundedTensor, "products", lambda _, queries: torch.randn(*queries.shape[:3], places[0][0]))
    assert not all(_needle_found(*place) for place in places[:3])
