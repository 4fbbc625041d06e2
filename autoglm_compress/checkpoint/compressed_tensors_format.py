"""The `pack-quantized` layout of compressed-tensors: symmetric integers, packed along the input dimension.

Per linear of [out, in]: `weight_packed` int32 [out, in * bits / 32], `weight_scale` [out, in / group_size] and
`weight_shape` int64 [2]; weight = q * scale with q in [-2^(bits-1), 2^(bits-1) - 1]. Packing itself is done by the
`compressed-tensors` package, so that what transformers and vLLM unpack is what was meant.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape, Quantization
from autoglm_compress.errors import UserError

FORMAT = "pack-quantized"


def is_packed(config: dict[str, Any], where: str) -> bool:
    """Whether a config describes weights in this layout.

    Raises:
        UserError: the weights are quantized in another format.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    described = quantization if isinstance(quantization, dict) else {}
    method, layout = described.get("quant_method"), described.get("format")
    if method != "compressed-tensors" or layout != FORMAT:
        given = " ".join(str(word) for word in (method, layout) if word) or repr(quantization)
        raise UserError(f"{where}: quantized as {given}: only compressed-tensors {FORMAT} can be read.")
    return True


def is_present(name: str, stored: Iterable[str]) -> bool:
    """Whether a weight is stored in packed form."""
    module = name.removesuffix(".weight")
    return all(f"{module}.{part}" in stored for part in ("weight_packed", "weight_scale", "weight_shape"))


def quantization_config(quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: one group of modules per group size."""
    by_size: dict[int, list[str]] = {}
    for linear, size in quantization.group_sizes:
        by_size.setdefault(size, []).append(linear)
    groups = {}
    for number, (size, linears) in enumerate(sorted(by_size.items())):
        groups[f"group_{number}"] = {
            "targets": [rf"re:.*\.{re.escape(linear)}$" for linear in linears],
            "weights": {
                "num_bits": quantization.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def quantized_shape(shape: ModelShape, config: dict[str, Any], where: str) -> ModelShape:
    """The shape with its quantization read back from `config.json`.

    Raises:
        UserError: the config does not say how each linear is quantized.
    """
    sizes, bits = {}, 0
    try:
        for group in config["quantization_config"]["config_groups"].values():
            weights = group["weights"]
            bits = weights["num_bits"]
            size = -1 if weights["strategy"] == "channel" else weights["group_size"]
            for linear in shape.family.layer_linears:
                if any(_matches(target, f"model.layers.0.{linear}") for target in group["targets"]):
                    sizes[linear] = size
    except (AttributeError, KeyError, TypeError, re.error):
        sizes = {}
    for linear in shape.family.layer_linears:
        if linear not in sizes:
            raise UserError(f"{where}: quantization_config.config_groups does not say how {linear} is quantized.")
    return replace(shape, quantization=Quantization(bits, tuple(sorted(sizes.items()))))


def _matches(target: str, module: str) -> bool:
    """Whether a target of a group, a class or a regular expression, means a linear."""
    return target == "Linear" or re.fullmatch(target.removeprefix("re:"), module) is not None


def pack(module: str, integers: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The stored tensors of one linear from its int8-valued integers [out, in] and scales [out, groups]."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        f"{module}.weight_packed": pack_to_int32(integers.to(torch.int8), bits),
        f"{module}.weight_scale": scales.contiguous(),
        f"{module}.weight_shape": torch.tensor(integers.shape, dtype=torch.int64),
    }


def dequantize(
    module: str, quantization: Quantization, read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The weight [out, in] of one packed linear, as an engine would compute with it."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(read(f"{module}.weight_shape").tolist())
    integers = unpack_from_int32(read(f"{module}.weight_packed"), quantization.bits, shape)
    scales = read(f"{module}.weight_scale")
    grouped = integers.to(dtype).reshape(shape[0], scales.shape[1], -1)
    return (grouped * scales.to(dtype).unsqueeze(-1)).reshape(shape)
