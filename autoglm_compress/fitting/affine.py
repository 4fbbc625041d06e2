"""A linear and its bias as one matrix, and what a linear has to give where a norm follows."""

import torch
from torch import nn

NEGLIGIBLE_GAIN = 1e-2
"""Targets are not divided by gains of a norm after a writer that are below this share of its largest gain."""


def affine(linear: nn.Linear) -> torch.Tensor:
    """The weight [out, in] in fp32, with the bias as one more column if there is one."""
    weight = linear.weight.float()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.float()[:, None]], dim=1)


def with_one(inputs: torch.Tensor, has_bias: bool) -> torch.Tensor:
    """Inputs [..., in], with a constant feature for the bias if there is one."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1) if has_bias else inputs


def before_norm(target: torch.Tensor, gain: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The writer's output for which the norm after it gives the target: the target's direction, at the present
    length.
    """
    gain = torch.where(gain.abs() < NEGLIGIBLE_GAIN * gain.abs().max(), torch.inf, gain.float())
    direction = nn.functional.normalize(target / gain, dim=-1)
    return direction * output.norm(dim=-1, keepdim=True)
