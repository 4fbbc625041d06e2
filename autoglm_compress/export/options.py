"""What a recipe or the command line can say about an export."""

from typing import Literal

from pydantic import BaseModel, Field


class ExportOptions(BaseModel):
    """The format, 8 bits for a 16-bit embedding and head if that is asked for, and what the model is called."""

    format: Literal["gguf"]
    embedding_bits: Literal[8] | None = None
    called: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
