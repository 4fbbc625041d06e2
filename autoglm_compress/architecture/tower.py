"""The parts of a model that stages keep as they are, and how their sizes follow the text tower's width."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from autoglm_compress.architecture.family import INNER, Family

FOLLOWING = ("hidden", INNER)
"""The axes of bridges whose lengths are the text tower's width, or a multiple of it."""


@dataclass(frozen=True)
class Bridge:
    """A tensor by which a tower writes to the residual stream: its axes, shape, and bytes of an element."""

    axes: tuple[str | int, ...]
    shape: tuple[int, ...]
    element_bytes: int

    def with_width(self, before: int, after: int) -> "Bridge":
        """The same tensor for a residual stream of another width."""
        sized = zip(self.axes, self.shape, strict=True)
        return replace(self, shape=tuple(size * after // before if axis in FOLLOWING else size for axis, size in sized))


@dataclass(frozen=True)
class Tower:
    """The sizes of a part of a model that stages keep as it is; its `bridges` follow the text tower's width."""

    name: str
    parameters: int
    bytes: int
    bridges: tuple[Bridge, ...] = ()

    def with_width(self, before: int, after: int) -> "Tower":
        """The same tower beside a residual stream of another width."""
        bridges = tuple(bridge.with_width(before, after) for bridge in self.bridges)
        elements, stored = self.parameters, self.bytes
        for old, new in zip(self.bridges, bridges, strict=True):
            added = prod(new.shape) - prod(old.shape)
            elements, stored = elements + added, stored + added * old.element_bytes
        return Tower(self.name, elements, stored, bridges)


def towers_of(family: Family, tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> tuple[Tower, ...]:
    """The kept towers of a family's model.

    Args:
        family: the model's.
        tensors: the full name, the shape and the bytes of an element of each tensor, those of the text tower or not.
    """
    found = {tower: Tower(tower, 0, 0) for tower in family.kept}
    for name, shape, element_bytes in tensors:
        tower = found.get(family.place(name).tower)
        if tower is None:
            continue
        axes, elements = family.bridge(name), prod(shape)
        bridge = () if axes is None else (Bridge(axes, tuple(shape), element_bytes),)
        found[tower.name] = Tower(
            tower.name, tower.parameters + elements, tower.bytes + elements * element_bytes, tower.bridges + bridge
        )
    return tuple(found.values())
