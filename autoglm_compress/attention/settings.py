"""What sparse attention reads in each layer, and the file beside a checkpoint that says so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoglm_compress.atomic import write_json
from autoglm_compress.errors import UserError

if TYPE_CHECKING:
    from autoglm_compress.attention.cache import PreallocatedCache

ATTENTION = "attention.json"
"""The name of the file beside a checkpoint. `from_pretrained` and engines do not look at it."""
FIRST = 1
"""Tokens at the start that are always read: models put attention there that is meant for nothing."""
FULL_LENGTH = 1024
"""The length up to which `top_k` is what it says. With `adaptive`, it grows in proportion beyond."""
SCORES = 1 << 22
"""Scores that are in memory at once where every query is sparse."""
SCORE_BYTES = 32
"""Bytes that are in memory for each of them, on the way to what is read."""
Count = TypeVar("Count", int, torch.Tensor)


class AttentionOptions(BaseModel):
    """What sparse attention reads, and how the cache keeps it.

    A step of decoding reads the `top_k` tokens that a KV group attends to most, the last `window` ones and the first.
    With `adaptive`, `top_k` grows with the length beyond 1,024 tokens, so 64 becomes a sixteenth of it. Shorter
    sequences than `dense_below` are read whole. `kv_bits` is 8 for a cache in INT8, or 16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adaptive: bool = True
    window: int = Field(default=16, ge=1, strict=True)
    kv_bits: Literal[8, 16] = 8
    dense_below: int = Field(default=2048, ge=0, strict=True)


@dataclass(frozen=True)
class LayerAttention:
    """The same of one layer. `top_k` None reads everything.

    With `every_query`, all tokens of a sequence read as few as if they were decoded one by one, and rounded as the
    cache would round, in one pass without a cache. That is for measuring.
    """

    top_k: int | None
    options: AttentionOptions
    every_query: bool = False

    def tokens_read(self, length: Count) -> Count:
        """The most tokens that a query reads of so many; more than there are where it reads everything."""
        if self.top_k is None:
            return length
        grown = self.top_k * length // FULL_LENGTH if self.options.adaptive else 0 * length
        if isinstance(grown, torch.Tensor):
            return grown.clamp(min=self.top_k) + self.options.window + FIRST
        return max(self.top_k, grown) + self.options.window + FIRST


class SparseAttention(AttentionOptions):
    """The options of a model, with the `top_k` of each layer (None reads everything), and what was measured of them."""

    schema_version: Literal[1] = 1
    top_k: tuple[int | None, ...] = Field(min_length=1)
    measured: Mapping[str, Any] = Field(default_factory=dict)

    @classmethod
    def load(cls, file: Path | str) -> "SparseAttention":
        """The content of an `attention.json`.

        Raises:
            UserError: it cannot be read, or a field is not as it should be.
        """
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}. {_ADVICE}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON: {error}. {_ADVICE}") from None
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "all of it"
            raise UserError(f"{file}: {field}: {first['msg']}, found {str(first['input'])[:60]}. {_ADVICE}") from None

    def save(self, file: Path) -> None:
        """Write an `attention.json`, whole or not at all."""
        write_json(file, {"schema_version": self.schema_version, **self.model_dump(mode="json")})

    def require_layers(self, layers: int, file: Path | str) -> None:
        """Raise UserError unless there is a `top_k` for each of a model's layers."""
        if len(self.top_k) != layers:
            raise UserError(
                f"{file}: top_k has {len(self.top_k)} entries, and the model {layers} layers: it is another model's. "
                f"{_ADVICE}"
            )

    def layer(self, number: int, every_query: bool = False) -> LayerAttention:
        """What one layer reads."""
        return LayerAttention(self.top_k[number], self, every_query)

    def apply(self, model: Any) -> "PreallocatedCache":
        """Let a model of `transformers` attend so, and give an empty cache for one conversation.

        Raises:
            UserError: the model has another number of layers.
        """
        from autoglm_compress.attention.cache import PreallocatedCache
        from autoglm_compress.attention.dynamic_sparse import NAME, set_options

        self.require_layers(model.config.get_text_config().num_hidden_layers, ATTENTION)
        model.set_attn_implementation(NAME)
        set_options(model, self.layer)
        return PreallocatedCache(model.config, self.kv_bits, as_kept=True)


_ADVICE = "Give the attention.json that the stage attention wrote for this checkpoint."
