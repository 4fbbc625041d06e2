"""A quantized linear with fixed integers and trained scales."""

import torch
from torch import nn

from autoglm_compress.checkpoint import Checkpoint


class ScaledLinear(nn.Module):
    """weight = (integers - zeros) * scales * gains. Only the gains, one per scale, are trained; they start at 1.

    The linear therefore keeps its integers and its number of bits, which plain training would lose (compare the scales
    that LSQ trains, Esser et al. 2020).
    """

    steps: torch.Tensor
    scales: torch.Tensor

    def __init__(self, steps: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("steps", steps)
        self.register_buffer("scales", scales)
        self.gains = nn.Parameter(torch.ones_like(scales))
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, checkpoint: Checkpoint, module: str, device: torch.device, dtype: torch.dtype) -> "ScaledLinear":
        """One of a checkpoint's linears, integers less zero points as [out, groups, group_size]."""
        integers, scales, zeros = checkpoint.read_integers(module)
        steps = integers.unflatten(1, (scales.shape[1], -1))
        if zeros is not None:
            steps = steps.to(torch.int16) - zeros.unsqueeze(-1)
        name = f"{module}.bias"
        bias = checkpoint.read(name).to(device, dtype) if name in checkpoint.infos else None
        return cls(steps.to(device), scales.to(device, dtype), bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in] to outputs [..., out]."""
        weight = (self.steps * (self.scales * self.gains).unsqueeze(-1)).flatten(1)
        return nn.functional.linear(inputs, weight, self.bias)
