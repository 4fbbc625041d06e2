"""The bytes of linears and embeddings in MNN's files, a slice of rows at a time."""

from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.exactness import Rounding, relative_error
from autoglm_compress.export.mnn_families import scheme_of
from autoglm_compress.export.mnn_graph import Place
from autoglm_compress.export.mnn_integers import alpha, header, packed_rows, slices_of


@dataclass(frozen=True)
class LinearBytes:
    """Where a linear is: its offset, bytes of integers with their header, of alpha and of the bias; the header's bytes.

    The header has none for plain numbers; `wide` says that its sizes are int32.
    """

    external: tuple[int, int, int, int]
    header: int
    wide: bool


@dataclass
class Roundings:
    """What was rounded, by tensor; tensors that are not named are as they were."""

    by_tensor: dict[str, Rounding] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return {name: asdict(rounding) for name, rounding in self.by_tensor.items()}


def write_linear(
    file: IO[bytes], checkpoint: Checkpoint, place: Place, order: torch.Tensor | None, roundings: Roundings
) -> LinearBytes:
    """Write a linear: integers, scales and zero points as the checkpoint has them, or fp16; then its bias in fp32.

    Args:
        file: where to.
        checkpoint: has the linear.
        place: which linear.
        order: of its rows, int64 [out]; None for the checkpoint's.
        roundings: gets what fp16 rounded.
    """
    shape, start, before, wide = checkpoint.shape, file.tell(), 0, False
    scheme = scheme_of(shape, place.module)
    if scheme is None:
        head = f"{place.module}.weight" == shape.family.head
        values = checkpoint.head_weight() if head else checkpoint.read(f"{place.module}.weight")
        roundings.by_tensor[f"{place.module}.weight"] = write_numbers(file, values, torch.float16, order)
        numbers = file.tell()
    else:
        integers, scales, zeros = checkpoint.read_integers(place.module)
        first, wide = header(place.out_features, place.in_features, scheme.bits)
        before = file.write(first)
        parts = slices_of(len(integers), order)
        for rows in parts:
            file.write(packed_rows(integers[rows], scheme.bits).tobytes())
        numbers = file.tell()
        for rows in parts:
            file.write(alpha(scales[rows], None if zeros is None else zeros[rows]).tobytes())
    end = file.tell()
    if place.biased:
        bias = checkpoint.read(f"{place.module}.bias").float()
        file.write((bias if order is None else bias[order]).numpy().tobytes())
    return LinearBytes((start, numbers - start, end - numbers, file.tell() - end), before, wide)


def write_numbers(file: IO[bytes], values: torch.Tensor, dtype: torch.dtype, order: torch.Tensor | None) -> Rounding:
    """Write rows of numbers [out, in] in a dtype of 16 bits; returns what that rounds."""
    changed, difference, size = 0, 0.0, 0.0
    for rows in slices_of(len(values), order):
        exact = values[rows]
        stored = exact.to(dtype).contiguous()
        file.write(stored.view(torch.uint8).numpy().tobytes())
        if exact.dtype != dtype:
            off = stored.double() - exact.double()
            changed += int((off != 0).sum())
            difference += float(off.square().sum())
            size += float(exact.double().square().sum())
    return Rounding(values.numel(), changed, relative_error(difference, size))
