"""The formats of quantized checkpoints, distinguished by `quantization_config` in `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from autoglm_compress.architecture import Family, ModelShape, Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ, COMPRESSED_TENSORS
from autoglm_compress.checkpoint import awq_format, compressed_tensors_format
from autoglm_compress.errors import UserError


class QuantizedFormat(Protocol):
    """The functions that each format's module provides."""

    def stored_shapes(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The tensors that stand for the weight [out, in] of a linear, with their shapes."""

    def quantization_config(self, quantization: Quantization, family: Family) -> dict[str, Any]:
        """The `quantization_config` of `config.json`, for a model of a family."""

    def read_quantization(self, shape: ModelShape, described: dict[str, Any], where: str) -> Quantization:
        """The quantization of the linears, read from such a config."""

    def pack(
        self, module: str, scheme: Scheme, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of one linear."""

    def unpack(
        self, module: str, scheme: Scheme, read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integers, scales and zero points of one linear, as `pack` takes them."""

    def dequantize(
        self, module: str, scheme: Scheme, read: Callable[[str], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [out, in] of one linear."""


FORMATS: Mapping[str, QuantizedFormat] = {COMPRESSED_TENSORS: compressed_tensors_format, AWQ: awq_format}


def format_of(config: dict[str, Any], where: str) -> QuantizedFormat | None:
    """The format of a checkpoint by its config; None for one that is not quantized.

    Raises:
        UserError: it is quantized in another format.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    described = quantization if isinstance(quantization, dict) else {}
    method, layout = described.get("quant_method"), described.get("format")
    if method == COMPRESSED_TENSORS and layout != compressed_tensors_format.LAYOUT:
        method = None
    if not isinstance(method, str) or method not in FORMATS:
        given = " ".join(str(word) for word in (described.get("quant_method"), layout) if word) or repr(quantization)
        raise UserError(
            f"{where}: quantized as {given}: only compressed-tensors {compressed_tensors_format.LAYOUT} and awq "
            "can be read."
        )
    return FORMATS[method]
