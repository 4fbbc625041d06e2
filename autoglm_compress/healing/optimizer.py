"""Optimizers and their learning rate."""

import math
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn

from autoglm_compress.errors import UserError
from autoglm_compress.healing.options import HealingOptions

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def make_optimizers(
    parameters: Sequence[tuple[str, nn.Parameter]], options: HealingOptions
) -> list[torch.optim.Optimizer]:
    """The optimizers of named parameters: one, or with `muon` a second for all that is no matrix of a layer.

    Muon (Jordan et al. 2024) makes a step's singular values equal; scaled as Moonlight does (Liu et al. 2025), it takes
    AdamW's learning rate.

    Raises:
        UserError: what the optimizer needs is not installed.
    """
    check_installed(options.optimizer)
    common = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer in EIGHT_BIT:
        kind = getattr(import_module("bitsandbytes.optim"), EIGHT_BIT[options.optimizer])
        return [kind([parameter for _, parameter in parameters], betas=BETAS, **common)]
    if options.optimizer == "adamw":
        return [torch.optim.AdamW([parameter for _, parameter in parameters], betas=BETAS, **common)]
    matrices = [parameter for name, parameter in parameters if parameter.dim() == 2 and ".layers." in name]
    rest = [parameter for name, parameter in parameters if parameter.dim() != 2 or ".layers." not in name]
    muon = torch.optim.Muon(matrices, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw", **common)
    return [muon, *([torch.optim.AdamW(rest, betas=BETAS, **common)] if rest else [])]


def check_installed(optimizer: str) -> None:
    """Raise UserError if what an optimizer needs is not installed."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer: muon: needs torch 2.9 or newer, and this is {torch.__version__}: use adamw.")
    if optimizer in EIGHT_BIT:
        try:
            import_module("bitsandbytes")
        except ImportError as error:
            raise UserError(
                f"optimizer: {optimizer}: pip install 'autoglm-compress[heal]' ({error}), or use adamw."
            ) from None


def learning_rate(step: int, steps: int, options: HealingOptions) -> float:
    """The rate of a step, from 0: linear warm-up, then a cosine (Loshchilov & Hutter 2017) to a share of the peak."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    last = options.final_learning_rate
    return options.learning_rate * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
