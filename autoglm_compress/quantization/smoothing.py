"""Smoothing pairs: where a scale per channel moves from the readers of an activation to what produces it.

AWQ (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization") multiplies the columns of the linears that read an
activation by s and divides what produces the activation by s. The model computes the same, but the columns that
matter are rounded more finely. The producer is a norm's gain, or the rows of a linear with nothing but an elementwise
product or a convex combination over tokens in between: up -> down and v -> o.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autoglm_compress.architecture import ModelShape

VALUE = "self_attn.v_proj"
UP = "mlp.up_proj"
FUSED_GATE_UP = "mlp.gate_up_proj"


@dataclass(frozen=True)
class Pair:
    """A producer of activations and the linears that alone read them, named relative to the layer.

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


def smoothing_pairs(shape: ModelShape) -> tuple[Pair, ...]:
    """The pairs of a layer, in the order in which the layer runs; together they scale the columns of every linear."""
    family = shape.family
    copies = shape.num_attention_heads // shape.num_key_value_heads
    attention_norm, mlp_norm = (Pair(norm, readers) for norm, readers in family.norm_readers.items())
    value = Pair(VALUE, (family.attention_output,), copies=copies, block=shape.head_dim)
    if FUSED_GATE_UP in family.layer_linears:
        up = Pair(FUSED_GATE_UP, (family.mlp_output,), first_row=shape.intermediate_size)
    else:
        up = Pair(UP, (family.mlp_output,))
    return attention_norm, value, mlp_norm, up


def fold(
    weights: Mapping[str, torch.Tensor], pair: Pair, scale: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Divide the producer's channels by a scale [channels] and multiply the readers' columns by it.

    `weights` are the tensors of one layer; those that change become fp32. The producer's gain or bias will be stored in
    `dtypes[its name]`, so it is rounded to that first and the scale becomes what the rounded values are smaller by: the
    fold stays exact.

    Returns:
        The tensors that change, by name, and the scale as applied; `weights`, which may be a view of a file, stays as
        it is.
    """
    folded = {}
    matrix = weights[f"{pair.producer}.weight"]
    vector_name = f"{pair.producer}.{'weight' if matrix.ndim == 1 else 'bias'}"
    if vector_name in weights:
        untouched, part = weights[vector_name].float().tensor_split([pair.first_row])
        stored = (part / scale).to(dtypes[vector_name]).to(part.dtype)
        # A value that leaves the stored range at either end stays as it is; a zero tells nothing about its scale.
        stored = torch.where(stored.isfinite() & (stored != 0), stored, part)
        scale = torch.where(part == 0, scale, part / stored)
        folded[vector_name] = torch.cat([untouched, stored])
    if matrix.ndim == 2:
        divided = folded[f"{pair.producer}.weight"] = matrix.to(torch.float32, copy=True)
        divided[pair.first_row :] /= scale.unsqueeze(1)
    columns = pair.spread(scale)
    folded |= {f"{reader}.weight": weights[f"{reader}.weight"] * columns for reader in pair.readers}
    return folded, scale
