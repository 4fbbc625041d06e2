"""The shapes that a model can be cut to, and the size of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np

from autoglm_compress.architecture import ModelShape

LEAST = 0.25
"""The smallest share of each size that is kept: less leaves little that a refit or healing can start from."""
STEPS = (128, 64, 32, 16, 8)
"""Sizes are multiples of the largest of these that divides the source's size and leaves FEWEST steps at least."""
FEWEST = 8
WIDTH_STEP = 8
"""What the width is a multiple of in any case, for kernels."""


class Stream(NamedTuple):
    """The sizes outside the FFN and the number of layers."""

    heads: int
    key_value_heads: int
    hidden: int


def step_of(size: int) -> int:
    """What a size's smaller ones are multiples of, if nothing else is asked for."""
    return next((step for step in STEPS if size % step == 0 and size >= FEWEST * step), 1)


def smaller_sizes(size: int, step: int) -> tuple[int, ...]:
    """The multiples of a step up to a size, from its smallest share on, ascending."""
    return tuple(range(ceil(LEAST * size / step) * step, size + 1, step))


def head_counts(shape: ModelShape, step: int) -> Iterator[tuple[int, int]]:
    """Numbers of query heads and KV heads, as many query heads in every KV group, whose outputs are multiples of a
    step.
    """
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    for kept in range(ceil(LEAST * groups), groups + 1):
        for each in range(1, heads // groups + 1):
            if LEAST * heads <= kept * each and kept * each * shape.head_dim % step == 0:
                yield kept * each, kept


@dataclass(frozen=True)
class Grid:
    """All combinations of a stream, an FFN width and a number of layers.

    `size` is what the target limits. It is linear in the layers and, where FFN widths are multiples of what they are
    quantized by, in these too, so four shapes of each stream give all of its sizes.
    """

    source: ModelShape
    streams: tuple[Stream, ...]
    neurons: tuple[int, ...]
    layers: tuple[int, ...]
    size: Callable[[ModelShape], int]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Whole numbers as float64 [streams, neurons, layers]."""
        low, high = self.neurons[0], self.neurons[-1]
        widths = np.array([(value - low) / max(high - low, 1) for value in self.neurons])
        depths = np.array(self.layers) - 1.0
        found = np.empty((len(self.streams), len(self.neurons), len(self.layers)))
        for number, stream in enumerate(self.streams):
            # At one layer and at two, of the narrowest FFN and of the widest.
            corner = np.array([[self.size(self._of(stream, f, layers)) for layers in (1, 2)] for f in (low, high)])
            one, each = corner[:, 0], corner[:, 1] - corner[:, 0]
            by_width = [values[0] + widths * (values[1] - values[0]) for values in (one, each)]
            found[number] = by_width[0][:, None] + by_width[1][:, None] * depths
        return np.rint(found)

    @property
    def smallest(self) -> int:
        """The least `size` of any shape."""
        return round(float(self.sizes.min()))

    def shape(self, place: tuple[int, ...]) -> ModelShape:
        """The shape at an index [stream, neurons, layers]."""
        stream, neurons, layers = place
        return self._of(self.streams[stream], self.neurons[neurons], self.layers[layers])

    def _of(self, stream: Stream, neurons: int, layers: int) -> ModelShape:
        return resized(self.source, stream, neurons, layers)


def resized(source: ModelShape, stream: Stream, neurons: int, layers: int) -> ModelShape:
    """The shape of a model with other sizes."""
    return source.with_sizes(
        {
            "num_hidden_layers": layers,
            "intermediate_size": neurons,
            "num_attention_heads": stream.heads,
            "num_key_value_heads": stream.key_value_heads,
            "hidden_size": stream.hidden,
        }
    )


def grid_of(
    source: ModelShape, multiple: int | None, size: Callable[[ModelShape], int], possible: Callable[[ModelShape], bool]
) -> Grid:
    """The grid around a source.

    Args:
        source: its shape.
        multiple: what sizes are multiples of; None for as much as divides the source's.
        size: what the target limits, of a shape.
        possible: whether there are surgeries from the source to a shape; asked for streams alone, of shapes without
            towers.
    """
    text = replace(source, kept=())
    hidden_step = max(multiple or step_of(source.hidden_size), WIDTH_STEP)
    widths = smaller_sizes(source.hidden_size, hidden_step)
    heads = list(head_counts(source, multiple or step_of(source.axis("query"))))
    pairs = (Stream(*counts, width) for counts in heads for width in widths)
    streams = tuple(
        stream
        for stream in pairs
        if possible(resized(text, stream, source.intermediate_size, source.num_hidden_layers))
    )
    neurons = smaller_sizes(source.intermediate_size, multiple or step_of(source.intermediate_size))
    fewest = max(ceil(LEAST * source.num_hidden_layers), source.first_layers, 1)
    return Grid(source, streams, neurons, tuple(range(fewest, source.num_hidden_layers + 1)), size)
