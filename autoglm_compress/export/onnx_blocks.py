"""Our integers as ONNX Runtime's MatMulNBits and GatherBlockQuantized take them, bit for bit.

Weights uint8 [out, blocks, inputs of a block * bits / 8] hold q + 2^(bits - 1), of 4-bit ones the even input in the low
nibble. Scales are fp32 [out, blocks]. Zero points, with 2^(bits - 1) added too, are packed along the blocks of a row in
the same way; without any they are 2^(bits - 1). w = (stored - zero) * scale.
(ContribOperators.md of ONNX Runtime.) Blocks have a power of two of inputs: a longer group has its scale in each of
its blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from autoglm_compress.architecture import Scheme

LEAST_BLOCK, LARGEST_BLOCK = 16, 128
"""Inputs of a block. The kernel takes 256 too, but has no faster code for it."""


@dataclass(frozen=True)
class BlockLayout:
    """How the rows of a linear with so many inputs, of one scheme, are stored."""

    bits: int
    block: int
    columns: int
    symmetric: bool

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.columns // self.block

    @property
    def row_bytes(self) -> tuple[int, int, int]:
        """Bytes of a row's weights, scales and zero points."""
        zeros = 0 if self.symmetric else -(-self.blocks * self.bits // 8)
        return self.columns * self.bits // 8, 4 * self.blocks, zeros


def block_layout(scheme: Scheme, columns: int) -> BlockLayout:
    """How rows of so many inputs of a scheme are stored.

    Raises:
        ValueError: they cannot be; the message says why.
    """
    group = columns if scheme.group_size == -1 else scheme.group_size
    if scheme.bits not in (4, 8):
        raise ValueError(f"INT{scheme.bits}: ONNX Runtime's MatMulNBits is known for INT4 and INT8")
    if group % LEAST_BLOCK:
        raise ValueError(f"groups of {group} inputs: MatMulNBits has blocks of {LEAST_BLOCK} inputs or a multiple")
    return BlockLayout(scheme.bits, min(group & -group, LARGEST_BLOCK), columns, scheme.symmetric)


def pack_weights(layout: BlockLayout, integers: torch.Tensor) -> np.ndarray:
    """Weights uint8 [out, blocks, bytes of a block] from integers int8 [out, in]."""
    return _packed(layout, integers).reshape(len(integers), layout.blocks, -1)


def pack_scales(layout: BlockLayout, scales: torch.Tensor) -> np.ndarray:
    """Scales fp32 [out, blocks] from floating-point ones [out, groups]."""
    return _per_block(layout, scales.float()).numpy()


def pack_zeros(layout: BlockLayout, zeros: torch.Tensor) -> np.ndarray:
    """Zero points uint8 [out, bytes of a row] from int8 [out, groups]."""
    return _packed(layout, _per_block(layout, zeros))


def _per_block(layout: BlockLayout, values: torch.Tensor) -> torch.Tensor:
    return values.repeat_interleave(layout.blocks // values.shape[1], dim=1)


def _packed(layout: BlockLayout, values: torch.Tensor) -> np.ndarray:
    """Unsigned integers of rows, two 4-bit ones to a byte: uint8 [out, bytes of a row]."""
    stored = values.numpy().view(np.uint8) ^ np.uint8(0x80)  # adds 128, from int8 to uint8
    if layout.bits == 8:
        return stored
    stored -= np.uint8(0x80 - 0x08)
    if stored.shape[1] % 2:
        stored = np.pad(stored, ((0, 0), (0, 1)))
    return stored[:, ::2] | (stored[:, 1::2] << 4)
