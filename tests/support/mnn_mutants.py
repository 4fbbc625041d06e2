"""Wrong parts of MNN's converter, each of which the proof must refuse."""

from typing import Any

import numpy as np
import torch

from autoglm_compress.export import mnn_families, mnn_integers
from autoglm_compress.export.mnn_graph import FeedForward, Layer


def swapped_nibbles(integers: torch.Tensor, bits: int) -> np.ndarray:
    stored = mnn_integers.packed_rows(integers, bits)
    return (stored >> 4) | (stored << 4)


def scales_of_the_next_group(scales: torch.Tensor, zeros: torch.Tensor | None) -> np.ndarray:
    return mnn_integers.alpha(scales.roll(1, 1), zeros)


def zeros_of_the_next_group(scales: torch.Tensor, zeros: torch.Tensor | None) -> np.ndarray:
    assert zeros is not None
    return mnn_integers.alpha(scales, zeros.roll(1, 1))


def order_of_the_checkpoint(*_: Any) -> None:
    return None


def frequencies_too_high(frequencies: torch.Tensor, head_dim: int) -> torch.Tensor:
    return mnn_families.whole_heads(frequencies, head_dim) * 1.05


def up_before_gate(self: FeedForward, states: torch.Tensor) -> torch.Tensor:
    gate, up = self.inputs[0](states).chunk(2, dim=-1)
    return self.down(self.activation(up) * gate)


def norms_left_out(self: Layer, states: torch.Tensor, mask: Any, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    states = states + self.attention(self.before(states), mask, cos, sin)
    return states + self.feed_forward(self.between(states))
