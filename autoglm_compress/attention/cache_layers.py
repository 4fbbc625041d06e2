"""The layers of a KV cache for `transformers` that is allocated ahead and may be rounded to INT8."""

from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from autoglm_compress.attention.kept_states import PlainBuffer, RoundedBuffer
from autoglm_compress.attention.token_buffer import TokenBuffer

KVBits = Literal[8, 16]
"""8 for INT8 with a scale per token and head; 16 for the dtype that the model computes in."""
KEPT = "kept_states"
"""The attribute of a tensor of keys that has the layer's (keys, values) as the cache keeps them."""


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of a layer with full attention. Growing does not copy, but for once in a chunk of tokens.

    In 16 bits it returns views, equal to what `DynamicLayer` returns. In INT8 it returns all states multiplied out, or
    with `as_kept` tensors of NaN that only `dynamic_sparse` attention can read: they have the integers as an attribute.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, kv_bits: KVBits = 16, as_kept: bool = False) -> None:
        self._keys: PlainBuffer | RoundedBuffer | None = None
        self._values: PlainBuffer | RoundedBuffer | None = None
        super().__init__()
        self._kind = RoundedBuffer if kv_bits == 8 else PlainBuffer
        self._as_kept = as_kept and kv_bits == 8

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys [batch, heads, length, head_dim] held, None before the first."""
        return None if self._keys is None else self._keys.held.whole()

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        """For the base class, which begins with None; states come by `update` alone."""
        assert value is None

    @property
    def values(self) -> torch.Tensor | None:
        """The values [batch, heads, length, head_dim] held, None before the first."""
        return None if self._values is None else self._values.held.whole()

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        """For the base class, which begins with None; states come by `update` alone."""
        assert value is None

    @property
    def _buffers(self) -> list[TokenBuffer]:
        return [buffer for kept in (self._keys, self._values) if kept is not None for buffer in kept.buffers]

    @property
    def held_tokens(self) -> int:
        """The tokens in memory."""
        return self._buffers[0].length if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the room for tokens to come included."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin, with the shapes, dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = self._kind(key_states), self._kind(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, tokens, head_dim]; returns those of all tokens."""
        self._append(key_states, value_states)
        return self._returned()

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None
        assert self._values is not None
        self._keys.append(key_states)
        self._values.append(value_states)

    def _returned(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._keys is not None
        assert self._values is not None
        keys, values = self._keys.held, self._values.held
        if not self._as_kept:
            return keys.whole(), values.whole()
        nan = torch.full((1,), torch.nan, dtype=self.dtype, device=self.device)
        standing_in = [nan.expand(kept.buffers[0].view.shape) for kept in (self._keys, self._values)]
        setattr(standing_in[0], KEPT, (keys, values))
        return standing_in[0], standing_in[1]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.held_tokens

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys that the next update with so many tokens returns."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: their number, negative, as `transformers` has it.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected the tokens to remove as a negative number, found {tokens_to_remove}")
        for buffer in self._buffers:
            buffer.drop_last(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens and give back the memory."""
        self._keys = self._values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make these rows the batch, as a beam search asks for."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row of the batch so many times."""
        if self.held_tokens:
            rows = self._buffers[0].view.shape[0]
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Make these rows the batch, if there is one."""
        for buffer in self._buffers if self.held_tokens else ():
            buffer.select_rows(indices)

    def offload(self) -> None:
        """Move the states to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the states back to the device they came from."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for buffer in self._buffers:
            buffer.to(device)


class PreallocatedSlidingLayer(PreallocatedLayer):
    """The same of a layer with a sliding window, which holds the last `sliding_window` - 1 tokens.

    After `activate_past_recording`, older ones are let go by `crop`, as it may remove tokens at the end first.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, kv_bits: KVBits = 16) -> None:
        super().__init__(kv_bits)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Hold all tokens until the next `crop`."""
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, tokens, head_dim]; returns those that the new tokens may see."""
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        keys, values = self._returned()
        if not self.record_past:
            self._slide()
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _slide(self) -> None:
        """Let go of the tokens that no later one sees."""
        for buffer in self._buffers:
            buffer.keep_last(self.sliding_window - 1)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys that the next update with so many tokens returns."""
        held = min(self.cumulative_length, self.sliding_window - 1)
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and let go of those that no later one sees.

        Args:
            tokens_to_remove: their number, negative, as `transformers` has it.
        """
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("crop: the window has passed older tokens: call activate_past_recording before")
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._slide()

    def reset(self) -> None:
        """Forget all tokens and give back the memory."""
        super().reset()
        self.cumulative_length = 0
