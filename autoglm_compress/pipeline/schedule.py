"""What a run has to do, given what earlier runs have done."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.stage import StageRecord
from autoglm_compress.stages import Makes


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

    def on_record(self, number: int) -> StageRecord | None:
        """The `stage.json` of a stage that is finished; not if results that it asked for are no longer known."""
        record = self.folder.finished(self.recipe.folder_name(number), self.keys[number])
        return record if record is not None and self._evaluated(number) else None

    def finished(self, number: int) -> StageRecord | None:
        """The same of a stage that is not to be done again all the same."""
        return None if number in self.again else self.on_record(number)

    def _evaluated(self, number: int) -> bool:
        """Whether all evaluations that a stage asks for are known; so it is if it asks for none."""
        tasks = self.recipe.stages[number].evaluates
        return not tasks or self.known(self.recipe.parents[number], tasks)

    def needs_weights(self, number: int) -> bool:
        """Whether a stage still needs the weights of the checkpoint that it takes."""
        to_do = number in self.to_make or self.finished(number) is None
        return to_do and self._reads_weights(number)

    def _reads_weights(self, number: int) -> bool:
        """Whether doing a stage reads the weights of the checkpoint that it takes: not if all it asks for is known."""
        return not self.recipe.stages[number].evaluates or number in self.again or not self._evaluated(number)

    @cached_property
    def to_make(self) -> tuple[int, ...]:
        """The stages that are to be done, as things were when this was first asked for.

        One whose weights were dropped is among them if another is to be made from it or it is still to be evaluated.
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
        """The stages that are not to be done and whose weights are there."""
        records = {number: self.finished(number) for number in range(self.last + 1) if number not in self.to_make}
        return [number for number, record in records.items() if record and not record.dropped]

    def finished_in_a_row(self, numbers: Iterable[int]) -> Iterator[StageRecord]:
        """The `stage.json` of each of these stages, up to the first that is not finished."""
        for number in numbers:
            record = self.on_record(number)
            if record is None:
                return
            yield record
