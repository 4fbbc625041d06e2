"""How a checkpoint's weights are quantized: which matrices, how many bits, how many scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from autoglm_compress.architecture.family import Family

COMPRESSED_TENSORS = "compressed-tensors"
AWQ = "awq"


@dataclass(frozen=True)
class Scheme:
    """Integers of so many bits, w = (q - zero) * scale, with a scale per `group_size` inputs (-1: per output).

    Symmetric schemes have no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    def groups(self, in_features: int) -> int:
        """How many scales a row of so many inputs has."""
        return 1 if self.group_size == -1 else in_features // self.group_size


@dataclass(frozen=True)
class Quantization:
    """Weight-only quantization of a checkpoint in one of the formats `compressed-tensors` and `awq`.

    `schemes` has the scheme of every quantized linear by its name in the model, such as `model.layers.0.mlp.up_proj` or
    `lm_head`, and `towers` has those of linears of kept towers; all other tensors have the checkpoint's dtype.
    """

    format: str
    schemes: Mapping[str, Scheme]
    towers: Mapping[str, Scheme] = field(default_factory=dict)

    def in_layer(self, prefix: str) -> dict[str, Scheme]:
        """The schemes of one layer's linears, by their names relative to the layer."""
        return {name.removeprefix(prefix): scheme for name, scheme in self.schemes.items() if name.startswith(prefix)}

    def by_linear(self, family: Family) -> dict[str, tuple[Scheme, ...]]:
        """The schemes that the linears of one name have in all layers, in order of first appearance."""
        found: dict[str, dict[Scheme, None]] = {}
        for name, scheme in self.schemes.items():
            found.setdefault(family.place(name).name, {})[scheme] = None
        return {name: tuple(schemes) for name, schemes in found.items()}

    def matrix_bytes(self, name: str, shape: tuple[int, int], element_bytes: int) -> int:
        """Bytes of one linear's weight [out, in] in the checkpoint: integers, scales, zero points, and its shape."""
        return self.scheme_bytes(self.schemes[name], shape, element_bytes)

    def scheme_bytes(self, scheme: Scheme, shape: tuple[int, int], element_bytes: int) -> int:
        """Bytes of the weight [out, in] of a linear with a scheme in the checkpoint."""
        rows, columns = shape
        groups = scheme.groups(columns)
        if self.format == AWQ:
            return (columns + groups) * rows // 2 + 2 * rows * groups
        zeros = 0 if scheme.symmetric else 4 * ceil(rows * scheme.bits / 32) * groups
        return rows * 4 * ceil(columns * scheme.bits / 32) + element_bytes * rows * groups + zeros + 16
