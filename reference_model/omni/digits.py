"""Pictured digits: the 8 x 8 images of scikit-learn, apart for training and for tests, and their distortions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

TESTED = 599
"""Images that training never sees, of 1,797."""
SPLIT_SEED = 26
TURN, SCALE, SHEAR, SHIFT = 0.16, 0.10, 0.12, 0.10
"""Standard deviations of the distortions: radians, ratios, ratios, and halves of the picture."""


def pictures(seen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The images [count, 8, 8] in uint8, white on black, and their digits [count], of training or of tests."""
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    chosen = order[TESTED:] if seen else order[:TESTED]
    images = np.rint(data.images[chosen] * 255 / 16).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(data.target[chosen]).long()


def distorted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [count, 8, 8] in uint8, each turned, scaled, sheared, moved and blurred a little at random."""
    count = len(images)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    turn, scale = normal() * TURN, torch.exp(normal(2) * SCALE)
    cosine, sine, shear = turn.cos(), turn.sin(), normal() * SHEAR
    rows = [cosine * scale[:, 0], (shear - sine) * scale[:, 1], sine * scale[:, 0], cosine * scale[:, 1]]
    matrix = torch.cat([torch.stack(rows, dim=1).view(count, 2, 2), normal(2, 1) * SHIFT], dim=2)
    grid = F.affine_grid(matrix, [count, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]
    moved = moved * (1 + 0.1 * normal(1, 1)) + 8 * normal(8, 8)
    return moved.clamp(0, 255).round().to(torch.uint8)
