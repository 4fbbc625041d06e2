"""The matrices of a checkpoint as an ONNX graph has them, read when they are written and not before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape, Scheme
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.onnx_blocks import BlockLayout, pack_scales, pack_weights, pack_zeros

WEIGHTS, SCALES, ZEROS = "weights", "scales", "zeros"


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix of the checkpoint, from `first` on; `module` is the full name of the linear or the embedding."""

    module: str
    first: int
    count: int
    columns: int

    @property
    def chosen(self) -> slice:
        """The rows, for indexing."""
        return slice(self.first, self.first + self.count)

    def half(self, number: int) -> "Rows":
        """The first (0) or the second half (1)."""
        return Rows(self.module, self.first + number * self.count // 2, self.count // 2, self.columns)


Matrix = Sequence[Rows]
"""A matrix of the graph: rows of the checkpoint's, one after another."""


def scheme_of(shape: ModelShape, matrix: Matrix) -> Scheme | None:
    """The scheme of a matrix's integers; None for plain numbers.

    Raises:
        ValueError: its parts are not alike.
    """
    found = {shape.schemes.get(rows.module) for rows in matrix}
    if len(found) > 1:
        raise ValueError(f"{', '.join(rows.module for rows in matrix)}: quantized in different ways")
    return found.pop()


def out_features(matrix: Matrix) -> int:
    """The rows of a matrix."""
    return sum(rows.count for rows in matrix)


class MatrixReader:
    """Reads parts of matrices. The integers read last are kept: their scales are often asked for next."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._last: tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] | None = None

    def values(self, matrix: Matrix) -> torch.Tensor:
        """Plain numbers [out, in] in their stored dtype."""
        return _joined([self.checkpoint.read(f"{rows.module}.weight")[rows.chosen] for rows in matrix])

    def part(self, matrix: Matrix, layout: BlockLayout, part: str) -> np.ndarray:
        """Weights, scales or zero points of a quantized matrix, as `onnx_blocks` has them."""
        return np.concatenate([self._packed(rows, layout, part) for rows in matrix])

    def _packed(self, rows: Rows, layout: BlockLayout, part: str) -> np.ndarray:
        integers, scales, zeros = self._integers(rows.module)
        if part == ZEROS and zeros is not None:
            return pack_zeros(layout, zeros[rows.chosen])
        if part == SCALES:
            return pack_scales(layout, scales[rows.chosen])
        return pack_weights(layout, integers[rows.chosen])

    def _integers(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self._last is None or self._last[0] != module:
            self._last = None  # before the next is read
            self._last = module, self.checkpoint.read_integers(module)
        return self._last[1]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
