"""Blocks of MatMulNBits against one element at a time, and against what the kernels compute from them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf import quantize as ggml_quantize
from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.architecture import Scheme
from autoglm_compress.export.eight_bits import eight_bit_blocks, rounded_to_eight_bits
from autoglm_compress.export.onnx_blocks import block_layout, pack_scales, pack_weights, pack_zeros

SCHEMES = st.builds(
    lambda bits, group, symmetric: Scheme(bits, group, symmetric),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 48, 64, 128, 256, -1]),
    st.booleans(),
)
PARTS = ("weights", "scales", "zeros")


def drawn(scheme: Scheme, rows: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random integers, bf16 scales of both signs and zero points."""
    columns = groups * (scheme.group_size if scheme.group_size > 0 else 48)
    generator = torch.Generator().manual_seed(seed)
    most, groups = 2 ** (scheme.bits - 1), scheme.groups(columns)
    integers = torch.randint(-most, most, (rows, columns), generator=generator).to(torch.int8)
    scales = (torch.randn(rows, groups, generator=generator) * 0.02).to(torch.bfloat16)
    zeros = torch.randint(-most, most, (rows, groups), generator=generator).to(torch.int8)
    return integers, scales, None if scheme.symmetric else zeros


def packed(
    scheme: Scheme, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[int, dict[str, np.ndarray]]:
    """Inputs of a block, and the inputs of the operator."""
    layout = block_layout(scheme, integers.shape[1])
    found = {"weights": pack_weights(layout, integers), "scales": pack_scales(layout, scales)}
    if zeros is not None:
        found["zeros"] = pack_zeros(layout, zeros)
    stored = [0 if name not in found else found[name].nbytes // len(integers) for name in PARTS]
    assert tuple(stored) == layout.row_bytes
    return layout.block, found


def entry(row: np.ndarray, place: int, bits: int) -> int:
    if bits == 8:
        return int(row[place])
    return int(row[place // 2]) >> 4 if place % 2 else int(row[place // 2]) & 15


@given(SCHEMES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_blocks_hold_integers_scales_and_zero_points_bit_for_bit(scheme: Scheme, rows: int, groups: int, seed: int):
    integers, scales, zeros = drawn(scheme, rows, groups, seed)
    block, found = packed(scheme, integers, scales, zeros)
    offset, group = 2 ** (scheme.bits - 1), integers.shape[1] // scales.shape[1]
    for row in range(rows):
        weights = found["weights"][row].reshape(-1)
        for column in range(integers.shape[1]):
            assert entry(weights, column, scheme.bits) - offset == int(integers[row, column])
            assert float(found["scales"][row, column // block]) == float(scales[row, column // group])
            if zeros is not None:
                zero = entry(found["zeros"][row], column // block, scheme.bits) - offset
                assert zero == int(zeros[row, column // group])


@given(SCHEMES, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_the_kernel_reads_from_them_what_they_are(scheme: Scheme, rows: int, groups: int, seed: int):
    integers, scales, zeros = drawn(scheme, rows, groups, seed)
    block, found = packed(scheme, integers, scales, zeros)
    columns = integers.shape[1]
    inputs = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))]
    stored = [ir.Value(name=name, const_value=ir.tensor(values, name=name)) for name, values in found.items()]
    sizes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": block, "accuracy_level": 0}
    node = ir.node("MatMulNBits", [*inputs, *stored], sizes, domain="com.microsoft", name="product")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 17, "com.microsoft": 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=stored, opset_imports=opsets, name="graph")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (unit,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    grouped = integers.double().unflatten(1, (scales.shape[1], -1))
    exact = (grouped - (0 if zeros is None else zeros.double().unsqueeze(-1))) * scales.double().unsqueeze(-1)
    assert np.array_equal(unit.T.astype(np.float64), exact.flatten(1).numpy())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_eight_bits_are_those_of_ggml(rows: int, blocks: int, seed: int, dtype: torch.dtype):
    values = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values[0, :32] = 0
    stored = ggml_quantize(values.float().numpy(), GGMLQuantizationType.Q8_0)
    bytes_of_blocks = stored.reshape(rows, blocks, 34)
    integers, scales = eight_bit_blocks(values)
    assert np.array_equal(integers.numpy().reshape(rows, blocks, 32), bytes_of_blocks[..., 2:].view(np.int8))
    assert np.array_equal(scales.numpy(), bytes_of_blocks[..., :2].copy().view(np.float16)[..., 0])
    read = torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q8_0)).to(dtype)
    assert torch.equal(rounded_to_eight_bits(values), read)


@pytest.mark.parametrize(
    ("scheme", "columns", "words"),
    [
        (Scheme(4, 8), 64, "groups of 8 inputs"),
        (Scheme(8, -1), 40, "groups of 40 inputs"),
        (Scheme(3, 32), 64, "INT3: ONNX Runtime's MatMulNBits"),
    ],
)
def test_what_no_kernel_reads_is_refused(scheme: Scheme, columns: int, words: str):
    with pytest.raises(ValueError, match=words):
        block_layout(scheme, columns)
