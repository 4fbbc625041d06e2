"""How large the result may be: parameters, bytes, or memory with a key-value cache."""

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from autoglm_compress.architecture import ModelShape
from autoglm_compress.memory_limit import read_bytes
from autoglm_compress.quantization.bit_choice import uniform
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.report.numbers import human, size

COUNT = re.compile(r"(\d+(?:\.\d+)?)([MB])")
RATIO = re.compile(r"(0?\.\d+)x")
TIMES = {"M": 10**6, "B": 10**9}


def _parameters(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (found := COUNT.fullmatch(value)) and float(found[1]) > 0:
        return round(float(found[1]) * TIMES[found[2]])
    if isinstance(value, str) and RATIO.fullmatch(value) and float(value[:-1]) > 0:
        return value
    raise ValueError("expected a number such as 3.2B or 110M, or a ratio below 1 such as 0.8x")


def _bytes(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (found := read_bytes(value)):
        return found
    raise ValueError("expected bytes, such as 2GB, 1.5GiB or 900MB")


class Target(BaseModel):
    """One of `parameters`, `bytes` and `memory`.

    `bytes` are those of the checkpoint's tensors, as they are stored or, with `bits`, once the layers' linears are
    quantized. `memory` is the same with a 16-bit key-value cache of `context` tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: Annotated[int | str, PlainValidator(_parameters)] | None = None
    bytes: Annotated[int, PlainValidator(_bytes)] | None = None
    memory: Annotated[int, PlainValidator(_bytes)] | None = None
    context: Annotated[int, Field(strict=True, gt=0)] | None = None
    bits: Literal[4, 8] | None = None
    group_size: Literal[32, 64, 128, -1] | None = None

    @model_validator(mode="after")
    def _that_belong_together(self) -> "Target":
        if [self.parameters, self.bytes, self.memory].count(None) != 2:
            raise ValueError("expected one of parameters, bytes and memory")
        if (self.memory is None) != (self.context is None):
            raise ValueError("expected memory and context together: the cache is as long as the context")
        if self.parameters is not None and self.bits is not None:
            raise ValueError("bits belongs to bytes and memory: it does not change how many parameters there are")
        if self.group_size is not None and self.bits is None:
            raise ValueError("group_size belongs to bits: give both")
        return self

    @property
    def multiple(self) -> int | None:
        """What sizes must be multiples of, so that the linears can be quantized in these groups."""
        group_size = self._quantization.group_size
        return group_size if self.bits and group_size > 0 else None

    @property
    def _quantization(self) -> QuantizationOptions:
        return QuantizationOptions(bits=self.bits or 8, group_size=self.group_size or 128)

    def limit(self, source: ModelShape) -> int:
        """The largest `size` that a result may have."""
        if isinstance(self.parameters, str):
            return int(float(self.parameters[:-1]) * source.parameters)
        return self.parameters or self.bytes or self.memory or 0

    def size(self, shape: ModelShape) -> int:
        """What the target limits, of a model."""
        if self.parameters is not None:
            return shape.parameters
        if self.bits is not None:
            shape = replace(shape, quantization=uniform(self._quantization, shape))
        return shape.bytes + (0 if self.context is None else shape.kv_cache_bytes(self.context))

    def spelled(self, amount: int) -> str:
        """An amount for the user, with what it is of."""
        if self.parameters is not None:
            return f"{human(amount).replace('G', 'B')} parameters"
        stored = f" at {self.bits} bits" if self.bits else ""
        cache = "" if self.context is None else f" with a cache of {self.context} tokens"
        return f"{size(amount)}{stored}{cache}"
