"""What a run has to do, given what earlier runs have done."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.recipe import Recipe
from autoglm_compress.stages.evaluate import Evaluate


def tasks_of(recipe: Recipe, last: int) -> tuple[str, ...]:
    """Every task that the recipe asks for up to its stage number `last`; the source is evaluated on all of them."""
    asked = list(recipe.evaluation.every_stage)
    for stage in recipe.stages[: last + 1]:
        asked += stage.tasks if isinstance(stage, Evaluate) else ()
    return tuple(dict.fromkeys(asked))


@dataclass(frozen=True)
class Schedule:
    """The stages of a recipe up to number `last`, of which those in `again` are done whether they are finished or not.

    `keys` are the keys of the stages, and `known` says whether the checkpoint of a stage (None: the source) was
    evaluated on tasks.
    """

    recipe: Recipe
    folder: RunFolder
    keys: Sequence[str]
    known: Callable[[int | None, Sequence[str]], bool]
    again: Collection[int]
    last: int

    def finished(self, number: int) -> dict[str, Any] | None:
        """The `stage.json` of a stage that is finished and is not to be done again all the same."""
        done = number not in self.again
        return self.folder.finished(self.recipe.folder_name(number), self.keys[number]) if done else None

    def done(self, number: int) -> bool:
        """Whether a stage needs the checkpoint that it takes no more."""
        stage = self.recipe.stages[number]
        if stage.makes_checkpoint:
            return number not in self.to_make and self.finished(number) is not None
        known = isinstance(stage, Evaluate) and self.known(self.recipe.parents[number], stage.tasks)
        return known and number not in self.again

    @cached_property
    def to_make(self) -> tuple[int, ...]:
        """The stages whose checkpoints are to be made, as things were when this was first asked for.

        One whose weights were dropped is among them if another is to be made from it or it is still to be evaluated.
        """
        found: set[int] = set()
        needed: set[int | None] = set()
        for number in reversed(range(self.last + 1)):
            if not self.recipe.stages[number].makes_checkpoint:
                if not self.done(number):
                    needed.add(self.recipe.parents[number])
                continue
            record = self.finished(number)
            used = number in needed or not self.known(number, self.recipe.evaluation.every_stage)
            if record is None or (record.get("dropped") and used):
                found.add(number)
                needed.add(self.recipe.parents[number])
        return tuple(sorted(found))

    def with_weights(self) -> list[int]:
        """The stages that are not to be made and whose weights are there."""
        records = {number: self.finished(number) for number in range(self.last + 1) if number not in self.to_make}
        return [number for number, record in records.items() if record and not record.get("dropped")]
