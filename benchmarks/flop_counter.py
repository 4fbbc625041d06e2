"""Counts the floating-point operations of the matrix products and factorizations that torch is asked for."""

from collections import Counter
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _product(args: tuple[Any, ...]) -> float:
    """[…, n, k] x [k, m]: the last two tensors, whatever is added to them."""
    left, right = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
    return 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _attention(args: tuple[Any, ...]) -> float:
    query, key = args[:2]
    return 4 * query.numel() * key.shape[-2]


def _cholesky(args: tuple[Any, ...]) -> float:
    return prod(args[0].shape[:-2]) * args[0].shape[-1] ** 3 / 3


def _solve(args: tuple[Any, ...]) -> float:
    """Two triangular systems; right-hand sides come first."""
    return 2 * args[0].numel() * args[1].shape[-1]


def _triangular(args: tuple[Any, ...]) -> float:
    return args[1].numel() * args[0].shape[-1]


def _inverse(args: tuple[Any, ...]) -> float:
    return 2 * prod(args[0].shape[:-2]) * args[0].shape[-1] ** 3 / 3


COSTS = {
    **dict.fromkeys(("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_"), _product),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "linalg_cholesky_ex": _cholesky,
    "cholesky_solve": _solve,
    "linalg_solve_triangular": _triangular,
    "cholesky_inverse": _inverse,
}
"""Eigenvalues and least squares are not counted: they are a small part of any stage."""


class FlopCounter(TorchDispatchMode):
    """Counts by dtype, as `flops_float32`, …, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter(dict.fromkeys(("flops_float32", "flops_bfloat16", "flops_float64"), 0.0))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        cost = COSTS.get(func.overloadpacket.__name__)
        if cost is not None:
            self.counts[f"flops_{str(args[0].dtype).removeprefix('torch.')}"] += cost(args)
        return func(*args, **(kwargs or {}))
