"""Optimizers and their learning rate."""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from autoglm_compress.errors import UserError
from autoglm_compress.healing.muon import Muon
from autoglm_compress.healing.options import HealingOptions

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def make_optimizers(
    parameters: Sequence[tuple[str, nn.Parameter]], options: HealingOptions
) -> list[torch.optim.Optimizer]:
    """The optimizers of named parameters: one, or with `muon` a second one for all parameters that are not layer
    matrices.

    Raises:
        UserError: what the optimizer needs is not installed.
    """
    check_installed(options.optimizer)
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer in EIGHT_BIT:
        kind = getattr(import_module("bitsandbytes.optim"), EIGHT_BIT[options.optimizer])
        return [kind(_groups(parameters, decay), lr=rate, betas=BETAS)]
    if options.optimizer == "adamw":
        return [torch.optim.AdamW(_groups(parameters, decay), lr=rate, betas=BETAS)]
    matrices = [parameter for name, parameter in parameters if parameter.dim() == 2 and ".layers." in name]
    rest = [(name, parameter) for name, parameter in parameters if parameter.dim() != 2 or ".layers." not in name]
    muon = Muon(matrices, lr=rate, momentum=MOMENTUM, weight_decay=decay)
    return [muon, *([torch.optim.AdamW(_groups(rest, decay), lr=rate, betas=BETAS)] if rest else [])]


def _groups(parameters: Sequence[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices have weight decay; norms, biases and gains of scales have none."""
    decays = [parameter.dim() == 2 and not name.endswith(".gains") for name, parameter in parameters]
    groups = [
        {"params": [parameter for (_, parameter), own in zip(parameters, decays, strict=True) if own is which]}
        for which in (True, False)
    ]
    return [group | {"weight_decay": rate} for group, rate in zip(groups, (decay, 0.0), strict=True) if group["params"]]


def check_installed(optimizer: str) -> None:
    """Raise UserError if what an optimizer needs is not installed."""
    if optimizer in EIGHT_BIT:
        try:
            import_module("bitsandbytes")
        except ImportError as error:
            raise UserError(f"{optimizer}: pip install 'autoglm-compress[heal]' ({error}), or use adamw.") from None


def learning_rate(step: int, steps: int, options: HealingOptions) -> float:
    """The rate of a step, from 0: linear warm-up, then a cosine (Loshchilov & Hutter 2017) to a share of the peak."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    last = options.final_learning_rate
    return options.learning_rate * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
