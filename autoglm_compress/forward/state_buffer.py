"""Hidden states of token batches, one batch after the other, in memory or in a mapped file."""

import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import torch

from autoglm_compress.errors import UserError


class StateBuffer:
    """A tensor for each of a list of shapes, by its number.

    Of a buffer in a file, the pages of the batch asked for before go back to the system when another is asked for:
    what is in them stays in the file, and a tensor given before still reads it. So no more than a batch is resident,
    however many there are.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, file: Path | None) -> None:
        """In a file, what is there already is kept.

        Raises:
            UserError: the disk has no room for the file.
        """
        self._shapes, self._dtype = list(shapes), dtype
        self._starts = list(accumulate(map(prod, shapes), initial=0))
        elements = self._starts[-1]
        self._mapped = _map(file, elements * dtype.itemsize) if file is not None and elements else None
        self._last: int | None = None
        if self._mapped is None:
            self._states = torch.empty(elements, dtype=dtype)
        else:
            self._states = torch.frombuffer(self._mapped, dtype=dtype, count=elements)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._last is not None and self._last != number:
            self._release(self._last)
        self._last = range(len(self))[number]  # raises IndexError, which ends a loop over the buffer
        return self._states[self._starts[self._last] : self._starts[self._last + 1]].view(self._shapes[self._last])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    def _release(self, number: int) -> None:
        """Let go of a batch's pages; those it shares with its neighbours are read again if they are needed."""
        if self._mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, stop = (self._starts[end] * self._dtype.itemsize for end in (number, number + 1))
        start -= start % mmap.PAGESIZE
        self._mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _map(file: Path, size: int) -> mmap.mmap:
    """A file of at least this size as memory, its disk space taken now.

    A mapped file that finds none later kills the process without a word.
    """
    try:
        with file.open("a+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
            elif os.fstat(stream.fileno()).st_size < size:
                stream.truncate(size)
            return mmap.mmap(stream.fileno(), size)
    except OSError as error:
        raise UserError(f"{file}: no room for {size / 1e9:.2f} GB of hidden states: {error.strerror}.") from None
