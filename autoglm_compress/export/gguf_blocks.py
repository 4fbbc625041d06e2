"""Our integers in ggml's blocks of 32 inputs, bit for bit.

Q4_0: fp16 d, then 16 bytes, of which byte j holds q[j] + 8 in its low and q[j + 16] + 8 in its high nibble; w = d q.
Q8_0: fp16 d, then 32 int8; w = d q.
Q4_1: fp16 d, fp16 m, then nibbles as in Q4_0; w = d (q + 8) + m, where m = -d (zero + 8).
(ggml-common.h and the `gguf` package's quants.py.) A group of more inputs has its scale in each of its blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.export.exactness import Rounding, relative_error
from autoglm_compress.slices import row_slices

BLOCK = 32
OFFSET = 8
"""What is added to 4-bit integers, which are stored without a sign."""


@dataclass(frozen=True)
class Packed:
    """Rows of blocks, uint8 [out, in / 32 * bytes of a block], and what packing them rounded, by kind."""

    data: np.ndarray
    roundings: dict[str, Rounding]


def block_type(scheme: Scheme, columns: int) -> str:
    """The name of the ggml type that holds rows of so many inputs of a scheme.

    Raises:
        ValueError: none does; the message says why.
    """
    group = columns if scheme.group_size == -1 else scheme.group_size
    kind = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}.get((scheme.bits, scheme.symmetric))
    if kind is None:
        zeros = "" if scheme.symmetric else " with zero points"
        raise ValueError(f"INT{scheme.bits}{zeros}: GGUF holds INT4, INT4 with zero points and INT8 without")
    if group % BLOCK:
        raise ValueError(f"groups of {group} inputs: GGUF has a scale for each {BLOCK}, so groups must divide by that")
    return kind


def pack_blocks(
    scheme: Scheme, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, rows: torch.Tensor | None
) -> Packed:
    """The blocks of one linear.

    Args:
        scheme: one that `block_type` knows a type for.
        integers: int8 [out, in], as `Checkpoint.read_integers` gives them.
        scales: floating point [out, groups].
        zeros: int8 [out, groups], or None.
        rows: the order that the engine has rows in, int64 [out]; None for the checkpoint's.
    """
    kinds = {"scales": scales} | ({} if zeros is None else {"minima": _minima(scales, zeros)})
    halves = {kind: values.to(torch.float16) for kind, values in kinds.items()}
    changed = {kind: _changed(halves[kind], values) for kind, values in kinds.items()}
    parts, difference, size = [], 0.0, 0.0
    for part in row_slices(len(integers)):
        chosen = part if rows is None else rows[part]
        q, stored = integers[chosen], {kind: values[chosen] for kind, values in halves.items()}
        if any(changed.values()):
            true = _weights(q, {kind: values[chosen] for kind, values in kinds.items()})
            difference += float((_weights(q, stored) - true).double().square().sum())
            size += float(true.double().square().sum())
        parts.append(_blocks(q, list(stored.values()), scheme.bits))
    error = relative_error(difference, size)
    roundings = {kind: Rounding(values.numel(), changed[kind], error) for kind, values in kinds.items()}
    return Packed(np.concatenate(parts), roundings)


def _minima(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """What a weight is whose integer is the least, fp32 [out, groups]: exact for scales of 16 bits."""
    return -scales.float() * (zeros.float() + OFFSET)


def _weights(integers: torch.Tensor, kinds: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights that integers stand for, fp32 [out, groups, inputs of a group]."""
    scales = kinds["scales"].float().unsqueeze(-1)
    grouped = integers.float().unflatten(1, (scales.shape[1], -1))
    if "minima" not in kinds:
        return grouped * scales
    return (grouped + OFFSET) * scales + kinds["minima"].float().unsqueeze(-1)


def _blocks(integers: torch.Tensor, kinds: list[torch.Tensor], bits: int) -> np.ndarray:
    """Some rows of blocks, uint8 [out, in / 32 * bytes of a block], with fp16 scales and minima [out, groups]."""
    rows, columns = integers.shape
    per_group = columns // BLOCK // kinds[0].shape[1]
    heads = [
        each.repeat_interleave(per_group, dim=1).contiguous().view(torch.uint8).view(rows, -1, 2) for each in kinds
    ]
    blocks = integers.view(rows, -1, BLOCK)
    if bits == 8:
        body = blocks.view(torch.uint8)
    else:
        nibbles = (blocks + OFFSET).view(torch.uint8)
        body = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    return torch.cat([*heads, body], dim=-1).view(rows, -1).numpy()


def _changed(stored: torch.Tensor, exact: torch.Tensor) -> int:
    return int((stored.to(torch.float32) != exact.to(torch.float32)).sum())
