"""AutoAWQ's GEMM layout: 4 bits with zero points, packed along the output dimension in an order that suits its kernel.

Per linear of [out, in]: `qweight` int32 [in, out / 8], `qzeros` int32 [in / group_size, out / 8] and `scales` fp16
[in / group_size, out]. Of the eight outputs in an int32, four bits each, the lowest first, come 0, 2, 4, 6, 1, 3, 5, 7.
weight = (q - zero) * scale with q and zero in [0, 15]; what is 0 here is -8 elsewhere in this package.
"""

from collections.abc import Callable
from typing import Any

import torch

from autoglm_compress.architecture import Family, ModelShape, Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ
from autoglm_compress.errors import UserError

PER_INT32 = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
OFFSET = 8


def stored_shapes(module: str, scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The tensors that stand for the weight [out, in] of a linear, with their shapes."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        f"{module}.qweight": (columns, rows // PER_INT32),
        f"{module}.qzeros": (groups, rows // PER_INT32),
        f"{module}.scales": (groups, rows),
    }


def quantization_config(quantization: Quantization, family: Family) -> dict[str, Any]:
    """The `quantization_config` of `config.json`; the scheme is the same for all linears of the layers."""
    scheme = next(iter(quantization.schemes.values()))
    return {
        "quant_method": AWQ,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": _not_converted(family),
    }


def _not_converted(family: Family) -> list[str]:
    """The modules of a family whose linears are not quantized."""
    return [family.roles.head, *(prefix.removesuffix(".") for prefix in family.kept.values())]


def read_quantization(shape: ModelShape, described: dict[str, Any], where: str) -> Quantization:
    """How a `quantization_config` in this layout says that the linears are quantized.

    Raises:
        UserError: it is one that this package does not read.
    """
    kept = described.get("modules_to_not_convert") or []
    size = described.get("group_size")
    expected = {"bits": 4, "zero_point": True, "version": "gemm"}
    found = {key: described.get(key) for key in expected}
    if str(found["version"]).lower() == "gemm":
        found["version"] = "gemm"
    if found != expected or not isinstance(size, int) or set(kept) - set(_not_converted(shape.family)):
        raise UserError(
            f"{where}: quantization_config: only the awq layout with bits 4, zero_point, version gemm, a "
            f"group_size and all linears of the layers quantized can be read; found {found}, group_size {size}, "
            f"modules_to_not_convert {kept}."
        )
    scheme = Scheme(4, size, symmetric=False)
    return Quantization(AWQ, {linear: scheme for linear, _ in shape.linear_shapes()})


def pack(
    module: str, scheme: Scheme, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear.

    Args:
        module: its name.
        scheme: 4 bits, asymmetric.
        integers: int8 [out, in] in [-8, 7]; `out` is a multiple of 8.
        scales: fp16 [out, groups].
        zeros: int8 [out, groups] in [-8, 7].
    """
    assert zeros is not None  # the layout has no symmetric grids
    return {
        f"{module}.qweight": _pack_columns(integers.T),
        f"{module}.qzeros": _pack_columns(zeros.T),
        f"{module}.scales": scales.T.contiguous(),
    }


def unpack(
    module: str, scheme: Scheme, read: Callable[[str], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, scales and zero points as `pack` takes them."""
    integers, scales, zeros = (read(f"{module}.{part}") for part in ("qweight", "scales", "qzeros"))
    return _unpack_columns(integers).T, scales.T, _unpack_columns(zeros).T


def dequantize(module: str, scheme: Scheme, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of one packed linear, as an engine would compute with it: in the scales' fp16."""
    integers, scales, zeros = unpack(module, scheme, read)
    steps = (integers.unflatten(1, (scales.shape[1], -1)) - zeros.unsqueeze(-1)).to(scales.dtype)
    return (steps * scales.unsqueeze(-1)).flatten(1).to(dtype)


def _pack_columns(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] in [-8, 7] as int32 [rows, columns / 8]."""
    nibbles = (values.to(torch.int32) + OFFSET).unflatten(1, (-1, PER_INT32))[..., list(ORDER)]
    shifts = torch.arange(0, 4 * PER_INT32, 4, dtype=torch.int32, device=values.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def _unpack_columns(packed: torch.Tensor) -> torch.Tensor:
    """The inverse: int8 [rows, columns] in [-8, 7]."""
    shifts = torch.arange(0, 4 * PER_INT32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    place = torch.tensor(ORDER, device=packed.device).argsort()
    return (nibbles[..., place].flatten(1) - OFFSET).to(torch.int8)
