"""The preallocated cache holds what transformers' own does, whatever is done with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from autoglm_compress.attention import PreallocatedCache
from autoglm_compress.attention.cache_layers import PreallocatedLayer, PreallocatedSlidingLayer
from autoglm_compress.attention.int8 import restore_states, round_states
from autoglm_compress.attention.token_buffer import CHUNK
from support.models import SHAPE, build_model

WINDOW = 8
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from([1, 2, 7, CHUNK, CHUNK + 3])),
        st.tuples(st.sampled_from(["reorder", "repeat", "select", "reset"]), st.just(0)),
        st.tuples(st.just("crop"), st.integers(0, 5)),
    ),
    min_size=1,
    max_size=12,
)


def _act(layer: Any, step: str, size: int, states: Callable[[int, int], torch.Tensor], rows: int) -> Any:
    """Do one step; what it returned."""
    if step == "update":
        return layer.update(states(rows, size), -states(rows, size))
    if step == "reorder":
        layer.reorder_cache(torch.arange(rows).flip(0))
    elif step == "repeat":
        layer.batch_repeat_interleave(2)
    elif step == "select":
        layer.batch_select_indices(torch.arange(0, rows, 2))
    elif step == "crop":
        layer.crop(-size)
    else:
        layer.reset()
    return None


@given(
    steps=STEPS, sliding=st.booleans(), recording=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=40, deadline=None)
def test_every_operation_leaves_what_transformers_has(
    steps: list[tuple[str, int]], sliding: bool, recording: bool, dtype: torch.dtype
) -> None:
    ours = PreallocatedSlidingLayer(WINDOW) if sliding else PreallocatedLayer()
    theirs = DynamicSlidingWindowLayer(WINDOW) if sliding else DynamicLayer()
    if sliding and recording:
        ours.activate_past_recording()
        theirs.activate_past_recording()
    rows, seen = 2, 0
    for number, (step, size) in enumerate(steps):
        if step == "crop" and (not seen or size > seen or (sliding and not recording and seen >= WINDOW)):
            continue
        if step == "select" and rows == 1:
            continue

        def states(count: int, tokens: int, number: int = number) -> torch.Tensor:
            torch.manual_seed(number)
            return torch.randn(count, 2, tokens, 4).to(dtype)

        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        found, expected = (_act(layer, step, size, states, rows) for layer in (ours, theirs))
        held = seen > 0
        rows = {"repeat": rows * 2, "select": (rows + 1) // 2, "reset": 2}.get(step, rows) if held else rows
        seen = {"update": seen + size, "crop": seen - size, "reset": 0}.get(step, seen)
        assert ours.get_seq_length() == theirs.get_seq_length() == seen
        if found is not None:
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_growing_keeps_the_memory_until_a_chunk_is_full() -> None:
    layer, token = PreallocatedLayer(), torch.randn(1, 2, 1, 4)
    layer.update(token, token)
    where = layer.keys.data_ptr()
    for _ in range(CHUNK - 1):
        layer.update(token, token)
    assert layer.keys.data_ptr() == where
    layer.update(token, token)
    assert layer.keys.data_ptr() != where
    assert layer.keys.shape[-2] == CHUNK + 1


def test_a_sliding_layer_does_not_hold_on_to_a_long_prompt() -> None:
    layer = PreallocatedSlidingLayer(WINDOW)
    layer.update(torch.randn(1, 2, 4096, 4), torch.randn(1, 2, 4096, 4))

    assert layer.nbytes == 2 * CHUNK * 2 * 4 * 4
    assert layer.held_tokens == WINDOW - 1


@given(
    scale=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_int8_is_within_half_a_step(scale: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(2, 3, 5, 16, generator=generator) * scale).to(dtype)

    rounded = round_states(states)

    step = states.float().abs().amax(-1, keepdim=True) / 127
    exact = (rounded.codes.float() * rounded.scales.float() - states.float()).abs()
    assert (exact <= step * 0.5 * (1 + 2**-7)).all()
    stored = (restore_states(rounded, dtype).float() - states.float()).abs()
    slack = torch.finfo(dtype).eps * states.float().abs()
    assert (stored <= step * 0.5 * (1 + 2**-7) + slack + step * 2**-6).all()
    assert torch.equal(round_states(torch.zeros(1, 1, 1, 4)).codes, torch.zeros(1, 1, 1, 4, dtype=torch.int8))


def test_int8_takes_half_the_memory() -> None:
    config = AutoConfig.for_model("llama", **(SHAPE | {"head_dim": 128}))
    sizes = {}
    for bits in (8, 16):
        cache = PreallocatedCache(config, bits)
        for layer in range(SHAPE["num_hidden_layers"]):
            cache.update(*torch.zeros(2, 1, 2, CHUNK, 128, dtype=torch.bfloat16), layer)
        sizes[bits] = cache.nbytes

    assert sizes[16] == 4 * 2 * 2 * CHUNK * 128 * 2
    assert sizes[8] / sizes[16] == pytest.approx((128 + 2) / 256)


def _continued(model: torch.nn.Module, cache: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt, a second turn and single tokens, all with one cache."""
    found, start = [], 0
    for size in (9, 6, 1, 1, 1):
        part = tokens[:, start : start + size]
        start += size
        found.append(model(part, attention_mask=mask[:, :start], past_key_values=cache).logits)
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["glm", "mistral", "qwen2"])
def test_a_padded_batch_in_turns_gives_the_same_logits(family: str, tokens: torch.Tensor) -> None:
    model = build_model(family)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0

    expected = _continued(model, DynamicCache(config=model.config), tokens, mask)
    found = _continued(model, PreallocatedCache(model.config), tokens, mask)
    rounded = _continued(model, PreallocatedCache(model.config, 8), tokens, mask)

    assert torch.equal(found, expected)
    likely, near = (each.float().log_softmax(-1) for each in (expected, rounded))
    assert 0 < (likely.exp() * (likely - near)).sum(-1).mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [{"num_beams": 3}, {"num_beams": 1}, {"prompt_lookup_num_tokens": 3}])
def test_generation_gives_the_same_tokens(family: str, kind: dict[str, int], tokens: torch.Tensor) -> None:
    model = build_model(family).float()
    prompt = tokens[:1, :12]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | kind

    expected = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **settings)
    assert torch.equal(model.generate(prompt, past_key_values=PreallocatedCache(model.config), **settings), expected)


def test_layers_of_other_kinds_stay_transformers_own() -> None:
    config = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])

    ours, theirs = PreallocatedCache(config).layers, DynamicCache(config=config).layers

    assert type(ours[0]) is type(theirs[0])
    assert type(ours[1]) is PreallocatedLayer
