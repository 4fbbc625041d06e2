"""The options of quantizing in a recipe."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autoglm_compress.quantization.bit_allocation import FEW, MANY


class Budget(BaseModel):
    """What `bits: auto` may use: bytes of all tensors of the checkpoint, or bits per weight of the layers' linears.

    Scales and a quantized head do not count in the latter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(strict=True, gt=0)] | None = None
    average_bits: Annotated[float, Field(ge=FEW, le=MANY)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Budget":
        if (self.bytes is None) is (self.average_bits is None):
            raise ValueError("expected one of bytes and average_bits")
        return self


class TowerOptions(BaseModel):
    """How the linears of a tower beside the text are rounded: to the nearest of 8 bits, a scale per output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[8]


class QuantizationOptions(BaseModel):
    """The options of quantizing."""

    backend: Literal["own", "autoawq"] = "own"
    method: Literal["awq", "round_to_nearest"] = "awq"
    bits: Literal[4, 8, "auto"]
    budget: Budget | None = None
    group_size: Literal[32, 64, 128, -1] = 128
    symmetric: bool | None = None
    error_feedback: bool = True
    head_bits: Literal[8, 16] = 16
    towers: dict[str, TowerOptions] = Field(default_factory=dict)
    format: Literal["compressed-tensors", "awq"] = "compressed-tensors"
    max_divergence: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @property
    def looks_at_activations(self) -> bool:
        """Whether calibration text decides about scales or bits."""
        return self.method == "awq" or self.bits == "auto"
