"""The `pack-quantized` layout of compressed-tensors: integers packed along the input dimension.

Per linear of [out, in]: `weight_packed` int32 [out, in * bits / 32], `weight_scale` [out, in / group_size] and
`weight_shape` int64 [2]; with zero points also `weight_zero_point` int32 [out * bits / 32, in / group_size].
weight = (q - zero) * scale with q and zero in [-2^(bits-1), 2^(bits-1) - 1]. Packing itself is done by the
`compressed-tensors` package, so that what transformers and vLLM unpack is what was meant.
"""

import re
from collections.abc import Callable, Collection
from math import ceil
from typing import Any

import torch

from autoglm_compress.architecture import Family, ModelShape, Quantization, Scheme, packed_linears
from autoglm_compress.architecture.quantization import COMPRESSED_TENSORS
from autoglm_compress.errors import UserError

LAYOUT = "pack-quantized"


def stored_shapes(module: str, scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The tensors that stand for the weight [out, in] of a linear, with their shapes."""
    rows, columns = shape
    groups = scheme.groups(columns)
    shapes: dict[str, tuple[int, ...]] = {
        f"{module}.weight_packed": (rows, ceil(columns * scheme.bits / 32)),
        f"{module}.weight_scale": (rows, groups),
        f"{module}.weight_shape": (2,),
    }
    if not scheme.symmetric:
        shapes[f"{module}.weight_zero_point"] = (ceil(rows * scheme.bits / 32), groups)
    return shapes


def quantization_config(quantization: Quantization, family: Family) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: one group of modules per scheme.

    Linears that have the same scheme in all layers are named once, by a regular expression. It would also mean linears
    of that name in kept towers, so those are to be ignored, or kept out where towers have schemes of their own.
    """
    alike = {linear: schemes[0] for linear, schemes in quantization.by_linear(family).items() if len(schemes) == 1}
    targets: dict[Scheme, list[str]] = {}
    rounded = {family.kept[family.place(module).tower] for module in quantization.towers}
    elsewhere = "".join(rf"(?!(.*\.)?{re.escape(prefix)})" for prefix in sorted(rounded))
    for linear, scheme in alike.items():
        targets.setdefault(scheme, []).append(rf"re:{elsewhere}(.*\.)?{re.escape(linear)}$")
    for module, scheme in quantization.schemes.items():
        if not any(module == linear or module.endswith(f".{linear}") for linear in alike):
            targets.setdefault(scheme, []).append(_target(module, family, elsewhere))
    for module, scheme in quantization.towers.items():
        numbered = re.sub(r"\\\.\d+(?=\\\.|$)", lambda _: r"\.\d+", re.escape(module))
        target = rf"re:(.*\.)?{numbered}$"
        if target not in targets.setdefault(scheme, []):
            targets[scheme].append(target)
    groups = {}
    for number, scheme in enumerate(sorted(targets, key=lambda scheme: (scheme.bits, scheme.group_size))):
        groups[f"group_{number}"] = {
            "targets": targets[scheme],
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size == -1 else "group",
                "group_size": None if scheme.group_size == -1 else scheme.group_size,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
            "format": LAYOUT,
        }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [
            *([] if family.roles.head in quantization.schemes else [family.roles.head]),
            *(_ignored(prefix, rounded) for prefix in family.kept.values() if prefix not in rounded),
        ],
    }


def _ignored(prefix: str, rounded: Collection[str]) -> str:
    """What names all of a kept tower but for towers within it that are rounded, by the prefixes of these."""
    within = sorted(other.removeprefix(prefix) for other in rounded if other.startswith(prefix))
    return rf"re:(.*\.)?{re.escape(prefix)}{''.join(f'(?!{re.escape(rest)})' for rest in within)}.*"


def _target(module: str, family: Family, elsewhere: str) -> str:
    """What names one linear of one layer.

    Beside kept towers, `transformers` may have other names for modules than files have for tensors, which begin in
    another way.
    """
    place = family.place(module)
    if not family.kept:
        return module
    if place.layer is None:
        return rf"re:(.*\.)?{re.escape(module.rpartition('.')[2])}$"
    return rf"re:{elsewhere}(.*\.)?layers\.{place.layer}\.{re.escape(place.name)}$"


def read_quantization(shape: ModelShape, described: dict[str, Any], where: str) -> Quantization:
    """How a `quantization_config` in this layout says that the linears are quantized.

    Raises:
        UserError: the config does not say so for each linear of the layers that it does not ignore.
    """
    schemes: dict[str, Scheme] = {}
    ignored: list[str] = []
    expected = [linear for linear, _ in shape.linear_shapes()]
    heads = [] if shape.tie_word_embeddings else [shape.family.roles.head]
    packed = packed_linears(shape.kept)
    try:
        ignored = [str(target) for target in described.get("ignore") or []]
        for group in described["config_groups"].values():
            weights = group["weights"]
            if weights.get("actorder") == "group":
                raise UserError(f"{where}: quantization_config: groups of reordered inputs (actorder) cannot be read.")
            if weights.get("type", "int") != "int" or weights["strategy"] not in ("group", "channel"):
                kind = f"{weights.get('type')} by {weights['strategy']}"
                raise UserError(f"{where}: quantization_config: {kind} cannot be read, only int by group or channel.")
            size = -1 if weights["strategy"] == "channel" else weights["group_size"]
            scheme = Scheme(weights["num_bits"], size, weights["symmetric"])
            for module in (*expected, *heads, *packed):
                named = any(_matches(target, module) for target in group["targets"])
                if named and not any(_matches(target, module) for target in ignored):
                    schemes[module] = scheme
    except (AttributeError, KeyError, TypeError, re.error):
        schemes = {}
    for module in (*expected, *packed):
        # An ignored linear has a plain weight, which the reader checks.
        if module not in schemes and not any(_matches(target, module) for target in ignored):
            raise UserError(f"{where}: quantization_config.config_groups does not say how {module} is quantized.")
    return Quantization(COMPRESSED_TENSORS, schemes, {module: schemes.pop(module) for module in packed})


def _matches(target: str, module: str) -> bool:
    """Whether a target of a group, a class, a name or a regular expression, means a linear."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def pack(
    module: str, scheme: Scheme, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear.

    Args:
        module: its name.
        scheme: how it is quantized.
        integers: int8 [out, in].
        scales: [out, groups], in the dtype they are to be stored in.
        zeros: int8 [out, groups], or None for a symmetric scheme.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored = {
        f"{module}.weight_packed": pack_to_int32(integers, scheme.bits),
        f"{module}.weight_scale": scales.contiguous(),
        f"{module}.weight_shape": torch.tensor(integers.shape, dtype=torch.int64),
    }
    if zeros is not None:
        stored[f"{module}.weight_zero_point"] = pack_to_int32(zeros, scheme.bits, packed_dim=0)
    return stored


def unpack(
    module: str, scheme: Scheme, read: Callable[[str], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Integers, scales and zero points as `pack` takes them."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(read(f"{module}.weight_shape").tolist())
    integers = unpack_from_int32(read(f"{module}.weight_packed"), scheme.bits, shape)
    scales = read(f"{module}.weight_scale")
    if scheme.symmetric:
        return integers, scales, None
    packed_zeros = read(f"{module}.weight_zero_point")
    return integers, scales, unpack_from_int32(packed_zeros, scheme.bits, scales.shape, packed_dim=0)


def dequantize(module: str, scheme: Scheme, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of one packed linear, as an engine would compute with it."""
    integers, scales, zeros = unpack(module, scheme, read)
    grouped = integers.to(dtype).unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        grouped = grouped - zeros.to(dtype).unsqueeze(-1)
    return (grouped * scales.to(dtype).unsqueeze(-1)).flatten(1)
