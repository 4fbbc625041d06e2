"""Rotary embeddings whose frequencies depend on how long a sequence is."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Sequence[int])


def by_frequencies(rows: Iterable[Row], config: Any) -> list[list[Row]]:
    """Rows in groups that `transformers` gives the same rotary frequencies, each row being read alone.

    LongRoPE (Ding et al. 2024) has one set of frequencies for sequences within `original_max_position_embeddings` and
    another for longer ones. `transformers` chooses by the longest row of a batch, so rows of both kinds must not share
    one, and what a short row has in common with a long one has other states there. `dynamic` frequencies change beyond
    `max_position_embeddings` only, where no row may end.
    """
    left = list(rows)
    groups = []
    for limit in sorted(_limits(getattr(config, "rope_parameters", None) or {})):
        groups.append([row for row in left if len(row) <= limit])
        left = [row for row in left if len(row) > limit]
    return [group for group in (*groups, left) if group]


def _limits(parameters: dict[str, Any]) -> set[int]:
    """The lengths beyond which frequencies change, of all layers or, where kinds of layers differ, of each kind."""
    kinds = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    return {kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"}
