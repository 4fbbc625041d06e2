"""The rows of `metrics.json`, from the records of stages and evaluations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.run_results import Evaluations
from autoglm_compress.pipeline.decided import decided
from autoglm_compress.pipeline.keys import KnownCheckpoint
from autoglm_compress.pipeline.metrics import row
from autoglm_compress.pipeline.plan import SOURCE, Plan
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.files import SOURCE_FOLDER_NAME
from autoglm_compress.records.metrics import Row
from autoglm_compress.records.stage import Shape, StageRecord
from autoglm_compress.resources import Resources
from autoglm_compress.stages import Makes


@dataclass(frozen=True)
class MetricsRows:
    """`checkpoint_of` gives a stage's checkpoint, or the source for None."""

    recipe: Recipe
    plan: Plan
    source: Checkpoint
    evaluations: Evaluations
    checkpoint_of: Callable[[int | None], KnownCheckpoint]

    def of(self, records: Sequence[StageRecord]) -> list[Row]:
        """A row for the source and for every finished stage, with all that was measured of its checkpoint.

        `records` are the `stage.json` of the stages, in order.
        """
        cost = self.evaluations.resources(SOURCE_FOLDER_NAME)
        source = self._row(None, SOURCE, SOURCE, cost, None, None, None, self._size(None))
        rows: list[Row] = []
        for number, record in enumerate(records):
            stage, parent = self.recipe.stages[number], self.recipe.parents[number]
            resources = {field: getattr(record, field) for field in Resources.FIELDS}
            makes_checkpoint = stage.makes is Makes.CHECKPOINT
            checkpoint = number if makes_checkpoint else parent
            # A stage without a checkpoint of its own is compared with the parent of the checkpoint that it takes.
            before = parent if makes_checkpoint or parent is None else self.recipe.parents[parent]
            previous = source if before is None else rows[before]
            name = self.recipe.folder_name(number)
            made = None if checkpoint is None else records[checkpoint]
            size = _bytes(record, "") if stage.makes is Makes.ARTIFACT else self._size(made)
            rows.append(self._row(checkpoint, name, stage.stage, resources, source, previous, made, size))
        return [source, *rows]

    def _row(
        self,
        number: int | None,
        name: str,
        stage: str,
        resources: dict[str, Any],
        source: Row | None,
        previous: Row | None,
        made: StageRecord | None,
        size: int,
    ) -> Row:
        checkpoint = self.checkpoint_of(number)
        results = self.evaluations.known(checkpoint.name, checkpoint.key)
        shape = Shape.of(self.source.shape) if made is None else made.shape or Shape()
        planned = self.plan.checkpoints[0 if number is None else number + 1].shape
        reached = decided(planned, None if made is None else made.shape)
        counts = {"parameters": reached.parameters, "unique_parameters": reached.unique_parameters}
        return row(name, stage, shape, counts, size, resources, results, source, previous)

    def _size(self, made: StageRecord | None) -> int:
        """Bytes of the weight files of a checkpoint, which may have been dropped; of the source for None."""
        return (
            sum(file.stat().st_size for file in self.source.files()) if made is None else _bytes(made, ".safetensors")
        )


def _bytes(record: StageRecord, ending: str) -> int:
    """Bytes of the files of a stage whose names end so."""
    return sum(file.bytes for name, file in record.files.items() if name.endswith(ending))
