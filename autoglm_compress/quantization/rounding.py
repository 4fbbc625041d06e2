"""Symmetric round-to-nearest with one scale per group of input features.

weight ~ integer * scale, integers in [-2^(bits-1), 2^(bits-1) - 1]. The scale maps a group's largest magnitude to the
middle of that range's two ends, 2^(bits-1) - 1/2, so that no value is off by more than half a step. Scales are rounded
to the dtype they are stored in before the integers are computed: what an engine dequantizes is what was rounded for.
"""

import torch


def symmetric_scales(weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """One scale per group of a weight [out, in], in the dtype it is stored in.

    `group_size` must divide `in`; -1 makes one group of each row. A group of zeros gets scale 1.

    Returns:
        Scales [out, groups].
    """
    largest = _grouped(weight, group_size).abs().amax(-1)
    scales = (largest / (2 ** (bits - 1) - 0.5)).to(dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def round_to_scales(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The int8 integers [out, in] nearest to a weight [out, in] on the grid of scales [out, groups]."""
    grouped = weight.unflatten(1, (scales.shape[1], -1))
    integers = (grouped / scales.to(weight.dtype).unsqueeze(-1)).round_()
    return integers.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8).flatten(1)


def quantize_symmetric(
    weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [out, in] (fp32) to the nearest values of its groups' grids.

    Returns:
        int8 integers [out, in] and scales [out, groups] in `dtype`.
    """
    scales = symmetric_scales(weight, bits, group_size, dtype)
    return round_to_scales(weight, scales, bits), scales


def dequantize(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that integers [out, in] and scales [out, groups] stand for, computed in `dtype`."""
    grouped = integers.to(dtype).unflatten(1, (scales.shape[1], -1))
    return (grouped * scales.to(dtype).unsqueeze(-1)).flatten(1)


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """A view [out, groups, group_size] of a weight [out, in]."""
    return weight.unsqueeze(1) if group_size == -1 else weight.unflatten(1, (-1, group_size))
