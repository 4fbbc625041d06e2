"""Our integers in MNN's bytes, against one number at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.export.mnn_integers import alpha, header, packed_rows


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(rows: int, groups: int, bits: int, zeros: bool, seed: int):
    generator, half, group = torch.Generator().manual_seed(seed), 1 << (bits - 1), 8
    integers = torch.randint(-half, half, (rows, groups * group), generator=generator).to(torch.int8)
    scales = torch.randn(rows, groups, generator=generator).bfloat16()
    points = torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8) if zeros else None
    packed, numbers = packed_rows(integers, bits), alpha(scales, points)
    assert packed.dtype == np.uint8
    assert numbers.dtype == np.float32
    for row in range(rows):
        for column in range(groups * group):
            byte = int(packed[row, column * bits // 8])
            stored = byte if bits == 8 else (byte >> 4 if column % 2 == 0 else byte & 15)
            assert stored - half == integers[row, column]
            part, scale = numbers[row, column // group], float(scales[row, column // group])
            if points is None:
                assert part == scale
            else:
                assert part.tolist() == [-int(points[row, column // group]) * scale, scale]


@pytest.mark.parametrize(("rows", "columns", "wide"), [(3, 64, False), (65_535, 8, False), (151_552, 8, True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_header_has_the_sizes_and_the_values(rows: int, columns: int, wide: bool, bits: int):
    found, is_wide = header(rows, columns, bits)
    kind, half = np.dtype(np.int32 if wide else np.uint16), 1 << (bits - 1)
    assert is_wide == wide
    assert found[0] == 2
    assert np.frombuffer(found[1 : 1 + 2 * kind.itemsize], kind).tolist() == [rows, columns]
    values = found[1 + 2 * kind.itemsize :]
    assert values[0] == (1 << bits) % 256
    assert np.frombuffer(values[1:], np.int8).tolist() == list(range(-half, half))
