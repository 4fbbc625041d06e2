"""Muon: momentum whose singular values are all made about one before it is taken as a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import sqrt
from typing import Any

import torch
from torch import nn

from autoglm_compress.healing.model import full, sharded_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic with the steepest slope at zero that keeps singular values of one near one."""
ROUNDS = 5
STACKED = 2**24
"""The most elements orthogonalized at once, if they are more than one matrix."""


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices [number, rows, columns] with the same singular vectors, and singular values of 0.7 to 1.2.

    By Newton-Schulz iteration (Jordan et al. 2024), in the dtype that is given. Zero stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum, for matrices.

    Steps are scaled as Moonlight does (Liu et al. 2025), so that they are as large as AdamW's for the same rate.
    Matrices of one shape are orthogonalized together, which is several times faster where they are small; in bf16 on a
    GPU, and in fp32 on a CPU, many of which compute bf16 a hundred times slower. The momentum of sharded matrices is
    sharded too, and each process orthogonalizes the whole matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's others take a closure, which nothing here gives
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in _stacks(moved):
                self._step(parameters, group)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None  # `step` leaves out those that have none
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(full(torch.lerp(gradient, average, group["momentum"])))
        dtype = torch.bfloat16 if directions[0].is_cuda else torch.float32
        size = 0.2 * sqrt(max(directions[0].shape)) * group["lr"]
        for parameter, step in zip(parameters, orthogonalized(torch.stack(directions).to(dtype)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(sharded_like(step.to(parameter.dtype), parameter), alpha=size)


def _stacks(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups of parameters of one shape, each as large as is orthogonalized at once."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    for shape, found in by_shape.items():
        number = max(1, STACKED // shape.numel())
        yield from (found[start : start + number] for start in range(0, len(found), number))
