"""Statistics of the inputs of linears for quantization. Their size does not depend on the number of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from autoglm_compress.processes import Processes

BLOCK = 256


class InputStatistics:
    """Sums over tokens of x x^T (the Gram matrix) and |x|, in fp32.

    Of the Gram matrix, which is symmetric, only the blocks on and above the diagonal are computed, in `upper`
    [features, features]; the other elements are ignored.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.upper = torch.zeros(features, features, device=device)
        self.absolute = torch.zeros(features, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs [..., features] of some tokens."""
        x = inputs.flatten(0, -2).float()
        self.absolute += x.abs().sum(0)
        # The bf16 units multiply values that were bf16 exactly.
        with fast_products() if inputs.dtype == torch.bfloat16 else nullcontext():
            for block in blocks(x.shape[1]):
                self.upper[block, block.start :].addmm_(x[:, block].T, x[:, block.start :])

    def add_up(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        for total in (self.upper, self.absolute):
            processes.add_up(total)

    @property
    def finite(self) -> bool:
        """Whether all inputs were finite. A NaN or infinite input shows on the diagonal."""
        return bool(self.upper.diagonal().isfinite().all())

    @property
    def squares(self) -> torch.Tensor:
        """Sums over tokens of x^2, [features]."""
        return self.upper.diagonal()

    def whole_gram(self) -> torch.Tensor:
        """The Gram matrix [features, features], below the diagonal too; it shares the memory of `upper`."""
        for block in blocks(len(self.upper)):
            self.upper[block.stop :, block] = self.upper[block, block.stop :].T
        return self.upper

    def scaled(self, scale: torch.Tensor) -> "InputStatistics":
        """The sums for the inputs divided by a scale [features]. They overwrite these sums."""
        self.absolute.div_(scale)
        self.upper.div_(scale).div_(scale[:, None])
        return self

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """The squared size of the outputs' change, tr(delta G delta^T), for a change [rows, in] of the weights."""
        error = torch.zeros((), device=delta.device)
        for block in blocks(delta.shape[1]):
            products = delta[:, block] @ self.upper[block, block.start :]
            products *= delta[:, block.start :]
            width = block.stop - block.start
            error += products[:, :width].sum() + 2 * products[:, width:].sum()
        return error


@contextmanager
def fast_products() -> Iterator[None]:
    """Multiply fp32 matrices on bf16 units where the machine has them, accumulating in fp32: several times faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def blocks(features: int) -> Iterator[slice]:
    """The blocks of rows and columns that a Gram matrix is computed and factored in."""
    return (slice(start, min(start + BLOCK, features)) for start in range(0, features, BLOCK))
