"""Which checkpoints of a run are deleted after use, and the peak disk use with these deletions."""

from collections.abc import Collection, Mapping, Sequence

from autoglm_compress.recipe import Recipe
from autoglm_compress.stages import Makes


def passing(recipe: Recipe) -> list[int]:
    """The stages whose checkpoints `keep` lets go: checkpoints that others are made from."""
    stages = zip(recipe.stages, recipe.parents, strict=True)
    taken = sorted({parent for stage, parent in stages if stage.makes is Makes.CHECKPOINT and parent is not None})
    return {"all": [], "last": taken[:-1], "none": taken}[recipe.keep]


def users(recipe: Recipe, number: int) -> list[int]:
    """The stages that take the checkpoint of a stage, to make another one or to measure it."""
    return [user for user, parent in enumerate(recipe.parents) if parent == number]


def most_bytes(recipe: Recipe, sizes: Sequence[int], to_make: Collection[int], there: Collection[int]) -> int:
    """Peak bytes of new checkpoints, beside those already on disk, while the stages run in order.

    `sizes` are those of the checkpoints of all stages.
    """
    last_user: Mapping[int, int] = {number: max(users(recipe, number)) for number in passing(recipe)}
    held = most = 0
    for number, size in enumerate(sizes):
        if number in to_make:
            held += size
            most = max(most, held)
        held -= sum(sizes[old] for old, last in last_user.items() if last == number and old in {*to_make, *there})
    return most


def kept_bytes(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Bytes of the checkpoints that remain after a whole run."""
    return sum(sizes) - sum(sizes[number] for number in passing(recipe))
