"""Fits by gradient descent for goals that least squares cannot reach: a whole block, and the next-token distribution.

They start from the ridge fits, go over the same calibration tokens a few times, and are kept only if they are better on
deciding rows. Adafactor (Shazeer & Stern 2018) keeps one number per row and column beside a weight, so a head of
151,552 x 4,096 can be fitted where Adam's moments would not fit; and its steps are relative to the size of the weight,
so that one rate serves all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from autoglm_compress.fitting.next_token_loss import FromStates, next_token_loss
from autoglm_compress.forward.features import counted
from autoglm_compress.processes import ALONE, Processes
from autoglm_compress.slices import row_slices

RATE = 3e-2
"""The first step's size, relative to the root mean square of what is fitted."""

EPSILONS = (1e-18, 1e-3)
"""Adafactor's lower bounds for a squared gradient and for the size of a weight. The paper's first value, 1e-30,
underflows in fp32 when squared. torch's default exceeds the gradients of a wide model and would dominate all steps.
"""

LEAST_GAIN = 1e-4

Advance = Callable[[int], None]
Projection = Callable[[torch.Tensor], torch.Tensor]
LayerRun = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Sends hidden states [rows, length, hidden_size] of token ids [rows, length] through a layer."""


def _ignore(_: int) -> None:
    """Progress that is not shown."""


class Batch(Protocol):
    """The data of a step: states of some rows, some of which decide instead."""

    @property
    def held_out(self) -> torch.Tensor:
        """Which of the rows [rows] decide instead of being fitted to."""

    def take(self, held_out: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The inputs of the loss, for the rows to fit to or for the rows that decide."""


@dataclass(frozen=True)
class PairedStates:
    """The token ids [rows, length] of a batch, what gives its hidden states [rows, length, hidden_size] in both models,
    and which rows are held out.

    With several processes, each has its rows of every batch, possibly none.
    """

    tokens: torch.Tensor
    ours: Callable[[], torch.Tensor]
    original: Callable[[], torch.Tensor]
    held_out: torch.Tensor

    def take(self, held_out: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ids and states of the rows to fit to, or of those that decide, in fp32."""
        rows = self.held_out if held_out else ~self.held_out
        return self.tokens[rows], self.ours()[rows].to(device).float(), self.original()[rows].to(device).float()


@dataclass(frozen=True)
class Descent:
    """Mean loss over the deciding rows before and after. The fit must not be used if the loss did not fall."""

    before: float
    after: float

    @property
    def improved(self) -> bool:
        """Whether the loss fell by more than rounding to 16 bits can undo."""
        return self.after < self.before * (1 - LEAST_GAIN)


Loss = Callable[..., float]
"""The mean loss of a batch. The flag says whether its gradient is added to the parameters' gradients."""


def descend(
    parameters: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    loss: Loss,
    passes: int,
    processes: Processes = ALONE,
    advance: Advance = _ignore,
) -> Descent:
    """Lower a loss by changing fp32 parameters in place: one step per batch, in order, for a number of passes.

    Several processes, which begin with the same parameters, take their rows of each step and add up the gradients.
    `advance` is called with 1 after each pass.
    """
    device = parameters[0].device
    own = torch.stack([torch.stack([(~batch.held_out).sum(), batch.held_out.sum()]) for batch in batches]).double()
    total = processes.add_up(own.clone())
    shares = own / total  # numbers of the rows, in all processes, that a step is fitted to and that decide

    def held_out_loss() -> float:
        found = torch.zeros((), dtype=torch.float64)
        decide = total[:, 1].nonzero().flatten().tolist()
        with torch.no_grad():
            for number in decide:
                if share := float(shares[number, 1]):
                    found += share * loss(*batches[number].take(True, device), False)
        return processes.tell(float(processes.add_up(found)) / len(decide))

    before = held_out_loss()
    optimizer = torch.optim.Adafactor(parameters, lr=RATE, eps=EPSILONS)
    fitted_to = total[:, 0].nonzero().flatten().tolist()
    steps = passes * len(fitted_to)
    for parameter in parameters:
        parameter.requires_grad_(True)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            number = fitted_to[step % len(fitted_to)]
            share = float(shares[number, 0])
            if share:
                loss(*batches[number].take(False, device), True)
            for parameter in parameters if processes.count > 1 else ():
                assert parameter.grad is not None  # given above, and zeroed in place
                processes.add_up(parameter.grad.mul_(share))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            if (step + 1) % len(fitted_to) == 0:
                advance(1)
    for parameter in parameters:
        processes.copy_first(parameter.requires_grad_(False))
    return Descent(before, held_out_loss())


def distil_layer(
    layer: nn.Module,
    run: LayerRun,
    batches: Sequence[PairedStates],
    project: Projection,
    passes: int,
    processes: Processes = ALONE,
) -> Descent:
    """Fit a decoder layer, in place, to give the original's residual stream where the next layer begins.

    Args:
        layer: the layer, which `run` sends hidden states through.
        batches: the states that go into it, and the original's where the next layer begins.
        project: the original's states in our basis.
        passes: how often to go over the batches.
        processes: those that have a share of every batch.
    """

    def loss(tokens: torch.Tensor, ours: torch.Tensor, original: torch.Tensor, backward: bool) -> float:
        target = project(original)
        weights = 1 / target.square().mean(-1, keepdim=True).clamp_min(1e-12)
        error = ((run(ours, tokens) - target).square() * weights).mean()
        if backward:
            error.backward()
        return error.item()

    return descend(list(layer.parameters()), batches, loss, passes, processes)


def distil_last_layer(
    layer: nn.Module,
    run: LayerRun,
    batches: Sequence[PairedStates],
    norms: tuple[nn.Module, nn.Module],
    heads: tuple[torch.Tensor, torch.Tensor],
    passes: int,
    processes: Processes = ALONE,
) -> Descent:
    """Fit the last decoder layer, in place, to the original's next-token distribution.

    Args:
        layer: the layer, which `run` sends hidden states through.
        batches: the states that go into it, and the original's after its last layer.
        norms: the final norms of ours and of the original.
        heads: [vocab_size, hidden_size] of ours and of the original, as they are stored.
        passes: how often to go over the batches.
        processes: those that have a share of every batch.
    """

    def loss(tokens: torch.Tensor, ours: torch.Tensor, original: torch.Tensor, backward: bool) -> float:
        counts = counted(tokens, len(heads[1])).to(ours.device)
        states = norms[0](run(ours, tokens))[counts]
        gradient = torch.zeros_like(states) if backward else None
        target = norms[1](original)[counts]
        expected = FromStates(target, heads[1])
        divergence = next_token_loss(states.detach(), heads[0], expected, states_gradient=gradient)
        if backward:
            states.backward(gradient)
        return divergence

    return descend(list(layer.parameters()), batches, loss, passes, processes)


def distil_head(
    head: torch.Tensor,
    batches: Sequence[PairedStates],
    norms: tuple[nn.Module, nn.Module],
    original_head: torch.Tensor,
    passes: int,
    processes: Processes = ALONE,
    advance: Advance = _ignore,
) -> Descent:
    """Fit a head [vocab_size, hidden_size], fp32 and in place, to the original's next-token distribution.

    Args:
        head: what is fitted.
        batches: the states after the last layers.
        norms: the final norms of ours and of the original.
        original_head: [vocab_size, hidden_size of the original].
        passes: how often to go over the batches.
        processes: those that have a share of every batch.
    """

    # In slices, so that the optimizer's copies of a gradient are never as large as the whole gradient.
    gradient = torch.zeros_like(head)
    slices = [head[rows] for rows in row_slices(len(head))]
    for part, rows in zip(slices, row_slices(len(head)), strict=True):
        part.grad = gradient[rows]

    @torch.no_grad()
    def loss(tokens: torch.Tensor, ours: torch.Tensor, original: torch.Tensor, backward: bool) -> float:
        counts = counted(tokens, len(original_head)).to(ours.device)
        states, target = norms[0](ours)[counts], norms[1](original)[counts]
        expected = FromStates(target, original_head)
        return next_token_loss(states, head, expected, head_gradient=gradient if backward else None)

    return descend(slices, batches, loss, passes, processes, advance)
