"""Muon for a model's matrices and AdamW for the rest, with float32 master weights of a bfloat16 model."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of stacked matrices close to one (quintic Newton-Schulz iteration)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonGroup:
    """All layer matrices of one shape, updated together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.master = torch.stack([parameter.detach().float() for parameter in parameters])
        self.momentum = torch.zeros_like(self.master)

    @torch.no_grad()
    def step(self, rate: float, beta: float = 0.95, decay: float = 0.1) -> None:
        """Apply one update with Nesterov momentum."""
        gradient = torch.stack([parameter.grad.float() for parameter in self.parameters])
        self.momentum.lerp_(gradient, 1 - beta)
        update = orthogonalize(gradient.lerp_(self.momentum, beta))
        rows, columns = self.master.shape[1:]
        self.master.mul_(1 - rate * decay).add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        torch._foreach_copy_(self.parameters, list(self.master.unbind(0)))


class MasterOptimizer:
    """Updates a bfloat16 model through float32 masters."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float = 3e-3) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        self.others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                shapes[tuple(parameter.shape)].append(parameter)
            else:
                self.others.append(parameter)
        self.groups = [MuonGroup(parameters) for parameters in shapes.values()]
        self.masters = [parameter.detach().float() for parameter in self.others]
        self.adam = torch.optim.AdamW(self.masters, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
        self.muon_rate, self.adam_rate = muon_rate, adam_rate

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply one update at a share of the peak learning rates and clear the gradients."""
        for group in self.groups:
            group.step(self.muon_rate * factor)
        for master, parameter in zip(self.masters, self.others, strict=True):
            master.grad = parameter.grad.float()
        for options in self.adam.param_groups:
            options["lr"] = self.adam_rate * factor
        self.adam.step()
        torch._foreach_copy_(self.others, self.masters)
        for parameter in [*self.others, *(parameter for group in self.groups for parameter in group.parameters)]:
            parameter.grad = None
