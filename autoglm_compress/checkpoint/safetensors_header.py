"""The header of a safetensors file: which tensors it holds, and whether the file is complete.

Layout: 8 bytes of little-endian header length, the JSON header, then the tensors' bytes.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Place, shape and dtype of a tensor, without its values. An unknown dtype keeps its name in the file.

    `name` is what the file calls the tensor.
    """

    file: Path
    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        UserError: the file is not safetensors, or shorter than its header says.
    """
    size = file.stat().st_size
    damaged = f"{file}: damaged or truncated safetensors file"
    again = "Copy or download the file again."
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{damaged}: {size} bytes are too few for its header. {again}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{damaged}: its header is not JSON ({error}). {again}") from None
    try:
        infos = {name: _info(file, name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{damaged}: its header does not describe tensors. {again}") from None
    expected = 8 + length + sum(info.nbytes for info in infos.values())
    if size != expected:
        raise UserError(f"{damaged}: {size} bytes, expected {expected}. {again}")
    return infos


def _info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if isinstance(dtype, torch.dtype) and stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {stop - start} bytes for {shape}")
    return TensorInfo(file, name, dtype, shape, stop - start)
