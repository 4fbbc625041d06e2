"""Which stages a run still has to do, given what earlier runs finished."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.stage import StageRecord
from autoglm_compress.stages import Makes


@dataclass(frozen=True)
class Schedule:
    """The stages of a recipe up to number `last`. Those in `again` run even if they are finished.

    `keys` are the keys of the stages, and `known` says whether the checkpoint of a stage (None: the source) was
    evaluated on tasks.
    """

    recipe: Recipe
    folder: RunFolder
    keys: Sequence[str]
    known: Callable[[int | None, Sequence[str]], bool]
    again: Collection[int]
    last: int

    def on_record(self, number: int) -> StageRecord | None:
        """The `stage.json` of a finished stage. None if results that the stage asked for are no longer known."""
        record = self.folder.finished(self.recipe.folder_name(number), self.keys[number])
        return record if record is not None and self._evaluated(number) else None

    def finished(self, number: int) -> StageRecord | None:
        """The `stage.json` of a finished stage that `again` does not name; None for all others."""
        return None if number in self.again else self.on_record(number)

    def _evaluated(self, number: int) -> bool:
        """Whether all evaluations that a stage asks for are known. True if it asks for none."""
        tasks = self.recipe.stages[number].evaluates
        return not tasks or self.known(self.recipe.parents[number], tasks)

    def needs_weights(self, number: int) -> bool:
        """Whether the stage still needs its parent's weights."""
        to_do = number in self.to_make or self.finished(number) is None
        return to_do and self._reads_weights(number)

    def _reads_weights(self, number: int) -> bool:
        """Whether running a stage reads its parent's weights. It does not if all it asks for is known."""
        return not self.recipe.stages[number].evaluates or number in self.again or not self._evaluated(number)

    @cached_property
    def to_make(self) -> tuple[int, ...]:
        """The stages to run. Computed at the first call and kept.

        A stage whose weights were dropped runs again if another stage needs its checkpoint, or if it must still be
        evaluated.
        """
        found: set[int] = set()
        needed: set[int | None] = set()
        for number in reversed(range(self.last + 1)):
            stage, record = self.recipe.stages[number], self.finished(number)
            missing = record is None
            if stage.makes is Makes.CHECKPOINT and record is not None and record.dropped:
                missing = number in needed or not self.known(number, self.recipe.evaluation.every_stage)
            if missing:
                found.add(number)
                if self._reads_weights(number):
                    needed.add(self.recipe.parents[number])
        return tuple(sorted(found))

    def with_weights(self) -> list[int]:
        """The finished stages whose weights are on disk."""
        records = {number: self.finished(number) for number in range(self.last + 1) if number not in self.to_make}
        return [number for number, record in records.items() if record and not record.dropped]

    def finished_in_a_row(self, numbers: Iterable[int]) -> Iterator[StageRecord]:
        """The `stage.json` of each of these stages, up to the first that is not finished."""
        for number in numbers:
            record = self.on_record(number)
            if record is None:
                return
            yield record
