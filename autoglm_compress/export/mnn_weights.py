"""The bytes of linears and embeddings in MNN's files, a slice of rows at a time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.eight_bits import eight_bit_blocks
from autoglm_compress.export.exactness import Rounding, relative_error
from autoglm_compress.export.mnn_graph import Place
from autoglm_compress.export.mnn_integers import alpha, header, packed_rows
from autoglm_compress.export.mnn_sizes import group_of, stored_scheme
from autoglm_compress.slices import row_slices

PLAIN_BITS = 16


@dataclass(frozen=True)
class LinearBytes:
    """Where a linear is: its offset, bytes of integers with their header, of alpha and of the bias; the header's bytes.

    The header has none for plain numbers; `wide` says that its sizes are int32.
    """

    external: tuple[int, int, int, int]
    header: int
    wide: bool

    def looked_up(self, scheme: Scheme | None) -> list[int]:
        """Where MNN looks tokens up in it, as `tie_embeddings` has that: offsets, bytes, bits, inputs of a group."""
        start, integers, numbers, _ = self.external
        bits = PLAIN_BITS if scheme is None else scheme.bits
        return [start + self.header, start + integers, numbers, bits, group_of(scheme)]


@dataclass
class Roundings:
    """What was rounded, by tensor and kind of number; what is not named is as it was."""

    found: list[tuple[str, str, Rounding]] = field(default_factory=list)

    def as_data(self) -> list[Any]:
        """Plain data."""
        return [[name, kind, asdict(rounding)] for name, kind, rounding in self.found]


class MatrixWriter:
    """Writes matrices of a checkpoint.

    Args:
        checkpoint: has them.
        embedding_bits: 8 to round a 16-bit embedding and a 16-bit head, None for what they are.
    """

    def __init__(self, checkpoint: Checkpoint, embedding_bits: int | None) -> None:
        self.checkpoint, self.embedding_bits, self.roundings = checkpoint, embedding_bits, Roundings()

    def scheme(self, module: str) -> Scheme | None:
        """How the integers of a module are stored; None for plain numbers."""
        return stored_scheme(self.checkpoint.shape, module, self.embedding_bits)

    def linear(self, file: IO[bytes], place: Place, order: torch.Tensor | None) -> LinearBytes:
        """Write a linear with its header: integers and numbers, or fp16; then its bias in fp32.

        Args:
            file: where to.
            place: which linear.
            order: of its rows, int64 [out]; None for the checkpoint's.
        """
        start, before, wide = file.tell(), 0, False
        if scheme := self.scheme(place.module):
            first, wide = header(place.out_features, place.in_features, scheme.bits)
            before = file.write(first)
            numbers = self._integers(file, place.module, scheme, order)
        else:
            self._plain(file, place.module, torch.float16, order)
            numbers = file.tell()
        end = file.tell()
        if place.biased:
            bias = self.checkpoint.read(f"{place.module}.bias").float()
            file.write((bias if order is None else bias[order]).numpy().tobytes())
        return LinearBytes((start, numbers - start, end - numbers, file.tell() - end), before, wide)

    def embedding(self, file: IO[bytes]) -> list[int] | None:
        """Write the embedding as a file of its own; returns where MNN finds it, as `tie_embeddings` has that.

        None is for a file in bf16, MNN's default.
        """
        module, shape = self.checkpoint.family.embedding.removesuffix(".weight"), self.checkpoint.shape
        if scheme := self.scheme(module):
            numbers = self._integers(file, module, scheme, None)
            return [0, numbers, file.tell() - numbers, scheme.bits, group_of(scheme)]
        half = shape.dtype != "bfloat16"
        self._plain(file, module, torch.float16 if half else torch.bfloat16, None)
        return [0, 0, 0, PLAIN_BITS, 0] if half else None

    def _integers(self, file: IO[bytes], module: str, scheme: Scheme, order: torch.Tensor | None) -> int:
        """Write integers and then alpha, which begins at the offset that is returned."""
        if module in self.checkpoint.shape.schemes:
            integers, scales, zeros = self.checkpoint.read_integers(module)
            self._count(module, "scales", scales, scales)
        else:
            integers, scales = eight_bit_blocks(self._values(module))
            zeros = None
        parts = _parts(len(integers), order)
        for rows in parts:
            file.write(packed_rows(integers[rows], scheme.bits).tobytes())
        numbers = file.tell()
        for rows in parts:
            file.write(alpha(scales[rows], None if zeros is None else zeros[rows]).tobytes())
        if zeros is not None:
            exact = -zeros.double() * scales.double()
            self._count(module, "minima", exact, exact.float())
        return numbers

    def _plain(self, file: IO[bytes], module: str, dtype: torch.dtype, order: torch.Tensor | None) -> None:
        values = self._values(module)
        for rows in _parts(len(values), order):
            file.write(values[rows].to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
        self._count(module, "values", values, values.to(dtype))

    def _values(self, module: str) -> torch.Tensor:
        head = f"{module}.weight" == self.checkpoint.family.head
        return self.checkpoint.head_weight() if head else self.checkpoint.read(f"{module}.weight")

    def _count(self, module: str, kind: str, exact: torch.Tensor, stored: torch.Tensor) -> None:
        """Count what rounding numbers [out, in] changed."""
        changed, difference, size = 0, 0.0, 0.0
        if exact.dtype != stored.dtype:
            for rows in row_slices(len(exact)):
                off = stored[rows].double() - exact[rows].double()
                changed += int((off != 0).sum())
                difference += float(off.square().sum())
                size += float(exact[rows].double().square().sum())
        rounding = Rounding(exact.numel(), changed, relative_error(difference, size))
        self.roundings.found.append((f"{module}.weight", kind, rounding))


def _parts(rows: int, order: torch.Tensor | None) -> Sequence[slice | torch.Tensor]:
    """Which rows to write, some at a time, in an order or in their own."""
    return [part if order is None else order[part] for part in row_slices(rows)]
