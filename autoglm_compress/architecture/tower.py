"""The parts of a model that stages keep as they are, and how their sizes follow the text tower's width."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from autoglm_compress.architecture.family import INNER, Family
from autoglm_compress.architecture.quantization import Quantization

FOLLOWING = ("hidden", INNER)
"""The axes of bridges whose lengths are the text tower's width, or a multiple of it."""
PACKED, WEIGHT = ".weight_packed", ".weight"
BESIDE_PACKED = (".weight_scale", ".weight_shape", ".weight_zero_point")
BYTES_PER_INT32 = 4


@dataclass(frozen=True)
class TowerTensor:
    """A tensor of a tower: its name and shape in the model, and its bytes in files.

    `axes` are those of a bridge, empty for all others. `linear` says that it is a linear's weight, `packed` that the
    files have it as integers of 8 bits. What stands beside such integers has no elements.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    axes: tuple[str | int, ...] = ()
    linear: bool = False
    packed: bool = False

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return prod(self.shape)

    @property
    def writes(self) -> bool:
        """Whether it is a matrix that writes to the text tower's residual stream."""
        return len(self.axes) == 2 and self.axes[0] == "hidden"

    @property
    def reads_neurons(self) -> bool:
        """Whether it is a matrix that reads neurons which are cut with the text tower's width."""
        return reads_neurons(self.axes)

    @property
    def is_fitted(self) -> bool:
        """Whether a cut of the text tower's width leaves something to fit."""
        return self.writes or self.reads_neurons

    def with_width(self, before: int, after: int) -> "TowerTensor":
        """The same tensor beside a residual stream of another width."""
        if not self.axes:
            return self
        sized = zip(self.axes, self.shape, strict=True)
        shape = tuple(size * after // before if axis in FOLLOWING else size for axis, size in sized)
        return replace(self, shape=shape, nbytes=self.nbytes * prod(shape) // self.elements)


@dataclass(frozen=True)
class Tower:
    """A part of a model that stages keep as it is, but for bridges, which follow the text tower's width."""

    name: str
    tensors: tuple[TowerTensor, ...]

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def bytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears by name, with the shape [out, in] of each."""
        found = ((tensor.name.removesuffix(WEIGHT), tensor.shape) for tensor in self.tensors if tensor.linear)
        return {module: (rows, columns) for module, (rows, columns) in found}

    @property
    def packed(self) -> tuple[str, ...]:
        """The linears that files have as integers."""
        return tuple(tensor.name.removesuffix(WEIGHT) for tensor in self.tensors if tensor.packed)

    def with_width(self, before: int, after: int) -> "Tower":
        """The same tower beside a residual stream of another width."""
        return Tower(self.name, tuple(tensor.with_width(before, after) for tensor in self.tensors))

    def rounded(self, quantization: Quantization, element_bytes: int) -> "Tower":
        """The same tower with those of its linears as integers that a quantization says so of."""
        return Tower(self.name, tuple(_rounded(tensor, quantization, element_bytes) for tensor in self.tensors))


def _rounded(tensor: TowerTensor, quantization: Quantization, element_bytes: int) -> TowerTensor:
    module = tensor.name.removesuffix(WEIGHT)
    scheme = quantization.towers.get(module) if tensor.linear else None
    if scheme is None:
        return tensor
    rows, columns = tensor.shape
    return replace(tensor, nbytes=quantization.scheme_bytes(scheme, (rows, columns), element_bytes), packed=True)


def reads_neurons(axes: tuple[str | int, ...]) -> bool:
    """Whether a tensor with these axes is a matrix that reads neurons, and makes none."""
    return axes[:1] != (INNER,) and axes[1:] == (INNER,)


def towers_of(family: Family, tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> tuple[Tower, ...]:
    """The kept towers of a family's model.

    Args:
        family: the model's.
        tensors: the shape and the bytes of each tensor by its full name in files, those of the text tower or not.
    """
    found: dict[str, list[TowerTensor]] = {tower: [] for tower in family.kept}
    for name, (shape, nbytes) in tensors.items():
        tower = found.get(family.place(name).tower)
        if tower is not None:
            tower.append(_tensor(family, name, shape, nbytes))
    return tuple(Tower(name, tuple(held)) for name, held in found.items())


def _tensor(family: Family, name: str, shape: tuple[int, ...], nbytes: int) -> TowerTensor:
    if name.endswith(BESIDE_PACKED):
        return TowerTensor(name, (0,), nbytes)
    packed = name.endswith(PACKED)
    if packed:
        name, shape = name.removesuffix(PACKED) + WEIGHT, (shape[0], shape[1] * BYTES_PER_INT32)
    linear = name.endswith(WEIGHT) and len(shape) == 2 and not family.is_kept_embedding(name)
    return TowerTensor(name, shape, nbytes, family.bridge(name) or (), linear, packed)


def packed_linears(towers: Iterable[Tower]) -> tuple[str, ...]:
    """The linears of towers that files have as integers."""
    return tuple(module for tower in towers for module in tower.packed)
