"""What is in exports to ONNX, as the `onnx` package reads them and plain arithmetic unpacks them."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from autoglm_compress.checkpoint import Checkpoint


@cache
def _model(folder: Path) -> Any:
    return onnx.load(str(folder / "model.onnx"))


@cache
def initializers(folder: Path) -> dict[str, np.ndarray]:
    """All tensors by name; bf16 ones in fp32."""
    return {tensor.name: _values(tensor) for tensor in _model(folder).graph.initializer}


def _values(tensor: Any) -> np.ndarray:
    found = numpy_helper.to_array(tensor)
    return found.astype(np.float32) if found.dtype.name == "bfloat16" else found


def node_types(folder: Path) -> set[str]:
    """The kinds of nodes of the graph."""
    return {node.op_type for node in _model(folder).graph.node}


def product(folder: Path, name: str) -> Any:
    """The node of a product; None if there is none of that name."""
    return next((node for node in _model(folder).graph.node if node.name == name), None)


def read_product(folder: Path, name: str) -> torch.Tensor:
    """The matrix that a product multiplies with, fp64 [out, in]."""
    node, tensors = product(folder, name), initializers(folder)
    if node.op_type == "MatMul":
        weight = node.input[1] if node.input[1] in tensors else f"{name[1:].replace('/', '.')}.weight"
        return torch.from_numpy(tensors[weight].T.copy()).double()
    attributes = {entry.name: entry.i for entry in node.attribute}
    weights, scales = tensors[node.input[1]], tensors[node.input[2]]
    zeros = tensors[node.input[3]] if len(node.input) > 3 else None
    return unpacked(weights, scales, zeros, attributes["bits"], attributes["K"], attributes["block_size"])


def unpacked(
    weights: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, columns: int, block: int
) -> torch.Tensor:
    """A matrix fp64 [out, in] as ContribOperators.md says that MatMulNBits reads it."""
    integers = _entries(weights.reshape(len(weights), -1), bits)[:, :columns]
    if zeros is None:
        zero = np.full((len(weights), columns // block), 2 ** (bits - 1))
    else:
        zero = _entries(zeros.reshape(len(weights), -1), bits)[:, : columns // block]
    scale = scales.reshape(len(weights), -1).astype(np.float64)
    return torch.from_numpy((integers - zero.repeat(block, 1)) * scale.repeat(block, 1))


def _entries(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed.astype(np.int64)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int64)


def exact_weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """A weight in fp64 [out, in], of integers times scales where it is quantized."""
    if f"{module}.weight" in checkpoint.infos:
        return checkpoint.read(f"{module}.weight").double()
    integers, scales, zeros = (None if part is None else part.double() for part in checkpoint.read_integers(module))
    grouped = integers.unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        grouped = grouped - zeros.unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).flatten(1)
