"""What a recipe or the command line can say about an export."""

from typing import Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

FAST = 4


class ExportOptions(BaseModel):
    """The format, 8 bits for a 16-bit embedding and head if that is asked for, and what the model is called.

    `accuracy_level` is of ONNX Runtime's products with integers: 4 rounds activations to 8 bits and is fast, 0 computes
    in fp32. It is 4 if none is given.
    """

    format: Literal["gguf", "mnn", "onnx"]
    embedding_bits: Literal[8] | None = None
    accuracy_level: Literal[0, 4] | None = None
    called: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")

    @field_validator("accuracy_level")
    @classmethod
    def _of_onnx(cls, level: int | None, info: ValidationInfo) -> int | None:
        if level is not None and info.data.get("format") not in ("onnx", None):
            raise ValueError("only format: onnx has it")
        return level


def accuracy_level(options: ExportOptions) -> int:
    """ONNX Runtime's accuracy level."""
    return FAST if options.accuracy_level is None else options.accuracy_level
