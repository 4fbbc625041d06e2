"""Slices of large matrices."""

from collections.abc import Iterator

SLICE_ROWS = 8192


def row_slices(rows: int) -> Iterator[slice]:
    """Slices of the rows of a large matrix, for work that would make fp32 copies of all of it."""
    return (slice(start, min(start + SLICE_ROWS, rows)) for start in range(0, rows, SLICE_ROWS))
