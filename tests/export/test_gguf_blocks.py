"""Blocks of ggml against the `gguf` package's own reading of them, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.architecture import Scheme
from autoglm_compress.errors import UserError
from autoglm_compress.export.exactness import Exactness, Rounding
from autoglm_compress.export.gguf_blocks import block_type, pack_blocks

SCHEMES = st.builds(
    lambda kind, group: Scheme(kind[0], group, kind[1]),
    st.sampled_from([(4, True), (4, False), (8, True)]),
    st.sampled_from([32, 64, 128, -1]),
)


def drawn(scheme: Scheme, rows: int, blocks: int, seed: int, dtype: torch.dtype):
    """Random integers, scales of both signs and zero points."""
    columns = blocks * max(scheme.group_size, 32)
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.bits - 1)
    integers = torch.randint(-most, most, (rows, columns), generator=generator).to(torch.int8)
    groups = scheme.groups(columns)
    scales = (torch.randn(rows, groups, generator=generator) * 0.01 + 0.02).to(dtype)
    zeros = None if scheme.symmetric else torch.randint(-8, 8, (rows, groups), generator=generator).to(torch.int8)
    return integers, scales, zeros


@given(SCHEMES, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**31), st.booleans())
def test_blocks_hold_integers_and_scales_bit_for_bit(scheme: Scheme, rows: int, blocks: int, seed: int, turned: bool):
    integers, scales, zeros = drawn(scheme, rows, blocks, seed, torch.bfloat16)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) if turned else None
    kind = block_type(scheme, integers.shape[1])
    packed = pack_blocks(scheme, integers, scales, zeros, order)
    read = dequantize(packed.data, GGMLQuantizationType[kind])
    group = integers.shape[1] // scales.shape[1]
    for place in range(rows):
        row = place if order is None else int(order[place])
        for column in range(integers.shape[1]):
            scale = np.float32(np.float16(float(scales[row, column // group])))
            expected = scale * np.float32(int(integers[row, column]))
            if zeros is not None:
                least = -float(scales[row, column // group]) * (int(zeros[row, column // group]) + 8)
                expected = scale * np.float32(int(integers[row, column]) + 8) + np.float32(np.float16(least))
            assert read[place, column].tobytes() == expected.tobytes() or read[place, column] == expected == 0
    assert packed.roundings["scales"] == Rounding(scales.numel(), 0, packed.roundings["scales"].error)
    assert packed.roundings["scales"].error <= 1e-3
    if zeros is None:
        assert packed.roundings["scales"].error == 0


def test_what_fp16_cannot_hold_is_counted():
    integers = torch.full((2, 64), 7, dtype=torch.int8)
    scales = torch.tensor([[2.0**-20 * 1.0078125, 0.5], [0.25, 0.125]], dtype=torch.bfloat16)
    rounding = pack_blocks(Scheme(8, 32), integers, scales, None, None).roundings["scales"]
    assert (rounding.stored, rounding.changed) == (4, 1)
    exact = scales.double().repeat_interleave(32, 1) * 7
    found = scales.half().double().repeat_interleave(32, 1) * 7
    assert rounding.error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e6, 2.0**-23 * 1.3])
def test_what_would_be_another_tensor_is_refused(scale: float):
    integers = torch.full((1, 32), 7, dtype=torch.int8)
    packed = pack_blocks(Scheme(4, 32), integers, torch.tensor([[scale]]), None, None)
    with pytest.raises(UserError, match=r"^m: fp16 cannot hold its scales: 1 of 1 change"):
        Exactness().add("m", "scales", packed.roundings["scales"])


@pytest.mark.parametrize(
    ("scheme", "columns", "words"),
    [
        (Scheme(8, 32, symmetric=False), 64, "INT8 with zero points"),
        (Scheme(4, 16), 64, "groups of 16 inputs"),
        (Scheme(4, -1), 48, "groups of 48 inputs"),
        (Scheme(3, 32), 64, "INT3: GGUF holds"),
    ],
)
def test_what_no_type_holds_is_refused(scheme: Scheme, columns: int, words: str):
    with pytest.raises(ValueError, match=words):
        block_type(scheme, columns)
