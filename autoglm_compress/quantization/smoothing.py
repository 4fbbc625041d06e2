"""Smoothing pairs: a scale per channel moves from the readers of an activation to its producer.

AWQ (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization") multiplies the columns of the linears that read an
activation by s and divides its producer by s. The model computes the same, but the columns that matter are rounded more
finely. The producer is a norm's gain, or the rows of a linear with nothing but an elementwise product or a convex
combination over tokens in between: up -> down and v -> o.
"""

from dataclasses import dataclass

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.quantization.grid import Grid


@dataclass(frozen=True)
class Pair:
    """A producer of activations and the linears that are their only readers, named relative to the layer.

    `first_row` is where the producer's rows begin (the up half of a fused gate and up). Each block of `block` channels
    is read `copies` times in a row: under grouped-query attention a KV head is read by several query heads.
    """

    producer: str
    readers: tuple[str, ...]
    first_row: int = 0
    copies: int = 1
    block: int = 1

    def averaged(self, statistic: torch.Tensor) -> torch.Tensor:
        """One value per produced channel from one per read channel."""
        return statistic.view(-1, self.copies, self.block).mean(1).flatten()

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """One value per read channel from one per produced channel."""
        return scale.view(-1, 1, self.block).expand(-1, self.copies, -1).flatten()


def smoothing_pairs(shape: ModelShape, layer: int = 0) -> tuple[Pair, ...]:
    """The pairs of a layer, in the order in which the layer runs."""
    tensors, found = shape.layer_tensors(layer), []
    for producer, readers in shape.family.smoothing.items():
        present = tuple(reader for reader in readers if f"{reader}.weight" in tensors)
        if present and f"{producer}.weight" in tensors:
            found.append(_pair(producer, present, shape))
    return tuple(found)


def _pair(producer: str, readers: tuple[str, ...], shape: ModelShape) -> Pair:
    made = shape.family.axes_of_linear(producer)[0]
    if made == "key_value":
        copies = shape.num_attention_heads // shape.num_key_value_heads
        return Pair(producer, readers, copies=copies, block=shape.head_dim)
    return Pair(producer, readers, first_row=shape.intermediate_size if made == "gate_up" else 0)


@dataclass(frozen=True)
class Folded:
    """A producer with its channels divided by a scale, and the scale [channels] as applied.

    `vector` is the producer's gain or bias, fp32; `grid` that of its rows, if it is a linear.
    """

    vector: torch.Tensor | None
    grid: Grid | None
    scale: torch.Tensor


def fold(
    pair: Pair, scale: torch.Tensor, vector: torch.Tensor | None, dtype: torch.dtype | None, grid: Grid | None
) -> Folded:
    """Divide the producer of a pair's activations by a scale [channels].

    If the producer is a rounded linear, its grid's scales are divided and its integers stay.

    Args:
        pair: the smoothing pair.
        scale: the divisor. A channel whose result would leave the range of its dtype keeps its values and gets the
            scale 1.
        vector: the producer's gain, or its bias if it has one.
        dtype: the stored dtype of the vector. The vector is rounded to it, and the scale is computed from the rounded
            values, so the fold is exact.
        grid: that of the rows of a producer that is a linear.
    """
    if grid is not None:
        scale = torch.where(grid.can_be_divided(pair.first_row, scale), scale, 1)
    if vector is not None:
        untouched, part = vector.float().tensor_split([pair.first_row])
        stored = (part / scale).to(dtype).to(part.dtype)
        # A value that would leave the stored range at either end is kept. A zero does not determine its scale.
        stored = torch.where(stored.isfinite() & (stored != 0), stored, part)
        scale = torch.where(part == 0, scale, part / stored)
        vector = torch.cat([untouched, stored])
    return Folded(vector, None if grid is None else grid.divided(pair.first_row, scale), scale)
