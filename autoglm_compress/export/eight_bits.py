"""Plain numbers in 8 bits: blocks of 32 inputs, each with a scale in fp16, as ggml's Q8_0 has them.

All formats round an embedding and a head in this way, so their cost is the same.
"""

import torch

from autoglm_compress.slices import row_slices

BLOCK = 32
LARGEST = 127
SLICE_ROWS = 1024
"""Rows that are rounded at a time: a slice is several times in memory, in fp32."""


class EndsError(ValueError):
    """Embedding or head cannot be in blocks of 8 bits."""


def require_blocks(inputs: int) -> None:
    """Raise EndsError if rows of so many inputs do not divide into blocks."""
    if inputs % BLOCK:
        raise EndsError(f"8 bits: {inputs} inputs do not divide by {BLOCK}, as the blocks do")


def eight_bit_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int8 [out, in] and scales fp16 [out, in / 32] of plain numbers [out, in].

    Halves are rounded away from zero, as `quantize_row_q8_0_ref` of ggml does.
    """
    integers = torch.empty(values.shape, dtype=torch.int8)
    scales = torch.empty(len(values), values.shape[1] // BLOCK, dtype=torch.float16)
    for rows in row_slices(len(values), SLICE_ROWS):
        integers[rows], scales[rows] = _blocks_of(values[rows])
    return integers, scales


def _blocks_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = values.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=-1) / LARGEST
    scaled = blocks * torch.where(scales == 0, 0.0, 1 / scales).unsqueeze(-1)
    size = scaled.abs()
    whole = size.floor()
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
    return rounded.to(torch.int8).flatten(1), scales.to(torch.float16)


def rounded_to_eight_bits(values: torch.Tensor) -> torch.Tensor:
    """Plain numbers [out, in] as their 8 bits read, in the same dtype."""
    integers, scales = eight_bit_blocks(values)
    return (integers.float().unflatten(1, (-1, BLOCK)) * scales.float().unsqueeze(-1)).flatten(1).to(values.dtype)
