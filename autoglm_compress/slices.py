"""Slices of large matrices."""

from collections.abc import Iterator

SLICE_ROWS = 8192


def row_slices(rows: int, at_once: int = SLICE_ROWS) -> Iterator[slice]:
    """Slices of the rows of a large matrix, for work that would make fp32 copies of all of it."""
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))
