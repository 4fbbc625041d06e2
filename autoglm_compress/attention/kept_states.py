"""The keys and values of a layer as a cache keeps them: in their own dtype, or rounded to INT8."""

from typing import Protocol

import torch

from autoglm_compress.attention.int8 import Rounded, restore_states, round_states
from autoglm_compress.attention.layout import gather
from autoglm_compress.attention.native import native_products, native_sums
from autoglm_compress.attention.token_buffer import TokenBuffer


class KeptTensor(Protocol):
    """Vectors [batch, heads, length, width] of tokens that attention can read whole or in part."""

    def whole(self) -> torch.Tensor:
        """All vectors, in the dtype they came in."""

    def products(self, queries: torch.Tensor) -> torch.Tensor:
        """Dot products [batch, heads, n, length] with vectors [batch, heads, n, width]."""

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """The vectors [batch, heads, n, width] of tokens [batch, heads, n]."""


class PlainTensor:
    """Vectors in their own dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def whole(self) -> torch.Tensor:
        """All vectors."""
        return self._tensor

    def products(self, queries: torch.Tensor) -> torch.Tensor:
        """Dot products [batch, heads, n, length]."""
        return queries @ self._tensor.transpose(-1, -2)

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """The vectors of tokens."""
        return gather(self._tensor, places)


class RoundedTensor:
    """Vectors in INT8 with a scale each, and the dtype they came in."""

    def __init__(self, rounded: Rounded, dtype: torch.dtype) -> None:
        self._rounded = rounded
        self._dtype = dtype

    def whole(self) -> torch.Tensor:
        """All vectors, multiplied out."""
        return restore_states(self._rounded, self._dtype)

    def products(self, queries: torch.Tensor) -> torch.Tensor:
        """Dot products in fp32 [batch, heads, n, length] with the integers, multiplied by the scales afterwards."""
        found = native_products(queries, self._rounded)
        if found is not None:
            return found
        codes, scales = self._rounded
        return (queries.float() @ codes.float().transpose(-1, -2)) * scales.transpose(-1, -2).float()

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """The vectors [batch, heads, n, width] added up by weights [batch, heads, n, length]."""
        found = native_sums(weights, self._rounded)
        return weights @ self.whole().to(weights.dtype) if found is None else found

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """The vectors of tokens, multiplied out."""
        return self.part(places).whole()

    def part(self, places: torch.Tensor) -> "RoundedTensor":
        """The integers of tokens [batch, heads, n]."""
        return RoundedTensor(Rounded(*(gather(part, places) for part in self._rounded)), self._dtype)


class PlainBuffer:
    """Grows by vectors in their own dtype."""

    def __init__(self, like: torch.Tensor) -> None:
        self._buffer = TokenBuffer(like)
        self.buffers = [self._buffer]

    def append(self, states: torch.Tensor) -> None:
        """Add tokens [batch, heads, tokens, width]."""
        self._buffer.append(states)

    @property
    def held(self) -> PlainTensor:
        """All vectors."""
        return PlainTensor(self._buffer.view)


class RoundedBuffer:
    """Grows by vectors that are rounded to INT8."""

    def __init__(self, like: torch.Tensor) -> None:
        self._dtype = like.dtype
        codes, scales = round_states(like[:, :, :0])
        self._codes, self._scales = TokenBuffer(codes), TokenBuffer(scales)
        self.buffers = [self._codes, self._scales]

    def append(self, states: torch.Tensor) -> None:
        """Round and add tokens [batch, heads, tokens, width]."""
        codes, scales = round_states(states)
        self._codes.append(codes)
        self._scales.append(scales)

    @property
    def held(self) -> RoundedTensor:
        """All vectors, rounded."""
        return RoundedTensor(Rounded(self._codes.view, self._scales.view), self._dtype)
