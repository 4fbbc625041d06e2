"""A buffer of tokens that grows by chunks, so that a new token does not copy the ones before it."""

import torch

CHUNK = 64
"""Tokens by which a buffer grows."""


class TokenBuffer:
    """Vectors [batch, heads, length, width] of tokens, appended at the end, of which the oldest may be let go.

    Views stay valid until tokens are removed at the end and others appended. No gradients pass through.

    Args:
        like: the first tokens [batch, heads, tokens, width], which are not appended.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._start = self._end = 0
        self._memory = like.new_empty(*like.shape[:2], 0, like.shape[-1])

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._end - self._start

    @property
    def view(self) -> torch.Tensor:
        """All tokens held, not copied."""
        return self._memory[:, :, self._start : self._end]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, those for tokens to come included."""
        return self._memory.nbytes

    def append(self, states: torch.Tensor) -> None:
        """Add tokens [batch, heads, tokens, width]."""
        end = self._end + states.shape[-2]
        if end > self._memory.shape[-2]:
            self._move(self.length + states.shape[-2])
            end = self._end + states.shape[-2]
        self._memory[:, :, self._end : end] = states.detach()
        self._end = end

    def keep_last(self, count: int) -> None:
        """Let go of all but the last tokens."""
        self._start = max(self._start, self._end - count)
        if self._start >= CHUNK:
            self._move(self.length)

    def drop_last(self, count: int) -> None:
        """Remove the last tokens."""
        self._end = max(self._start, self._end - count)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make these rows of the batch [rows] the batch. A row may be there several times, or not at all."""
        self._memory = self._memory.index_select(0, rows.to(self._memory.device))

    def to(self, device: torch.device | str) -> None:
        """Move the memory to a device."""
        self._memory = self._memory.to(device, non_blocking=True)

    def _move(self, tokens: int) -> None:
        """Move the tokens held to the start of new memory, with room for so many and the rest of a chunk."""
        held = self.view
        capacity = -(-tokens // CHUNK) * CHUNK
        self._memory = held.new_empty(*held.shape[:2], capacity, held.shape[-1])
        self._memory[:, :, : held.shape[-2]] = held
        self._start, self._end = 0, held.shape[-2]
