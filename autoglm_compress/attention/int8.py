"""INT8 with one scale per token and head."""

from typing import NamedTuple

import torch

LARGEST = 127


class Rounded(NamedTuple):
    """Integers [..., width] in int8, and their scales [..., 1] in bf16."""

    codes: torch.Tensor
    scales: torch.Tensor


def round_states(states: torch.Tensor) -> Rounded:
    """Round states [..., width] to the nearest of 255 levels, by the largest magnitude of each vector.

    The scale is rounded to bf16 before it is used, so no value is further than half a step from its level.
    """
    exact = states.float()
    scales = (exact.abs().amax(-1, keepdim=True) / LARGEST).to(torch.bfloat16)
    scales = scales.clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = (exact / scales).round_().clamp_(-LARGEST, LARGEST)
    return Rounded(codes.to(torch.int8), scales)


def restore_states(rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """The states [..., width] that integers and scales stand for."""
    wide = torch.promote_types(torch.bfloat16, dtype)  # fp16 does not have the range of the scales
    return (rounded.codes * rounded.scales.to(wide)).to(dtype)
