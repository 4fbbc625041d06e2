"""The rows of `metrics.json`, from what stages and evaluations left on record."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.run_results import Evaluations
from autoglm_compress.pipeline.metrics import row
from autoglm_compress.pipeline.plan import SOURCE, Plan, shape_data
from autoglm_compress.pipeline.run_folder import RunFolder
from autoglm_compress.recipe import Recipe
from autoglm_compress.records.files import SOURCE_FOLDER_NAME, read_json
from autoglm_compress.records.metrics import Row
from autoglm_compress.resources import Resources
from autoglm_compress.stages.evaluate import Evaluate


@dataclass(frozen=True)
class MetricsRows:
    """`checkpoint_of` gives name, key and folder of a stage's checkpoint, or of the source for None."""

    recipe: Recipe
    plan: Plan
    source: Checkpoint
    folder: RunFolder
    keys: Sequence[str]
    evaluations: Evaluations
    checkpoint_of: Callable[[int | None], tuple[str, str, Path]]

    def of(self, records: Sequence[dict[str, Any]]) -> list[Row]:
        """A row for the source and for every finished stage, with all that was measured of its checkpoint.

        `records` are those of the stages of this run so far; what an earlier one left of later stages comes after.
        """
        cost = self.evaluations.resources(SOURCE_FOLDER_NAME)
        source = self._row(None, SOURCE, SOURCE, cost, None, None)
        rows: list[Row] = []
        records = [*records, *self._finished_later(len(records))]
        for number, record in enumerate(records):
            stage, parent = self.recipe.stages[number], self.recipe.parents[number]
            resources = {field: record.get(field) for field in Resources.FIELDS}
            checkpoint = number if stage.makes_checkpoint else parent
            # What a stage that only looks is compared with is what the checkpoint it looks at is compared with.
            before = parent if stage.makes_checkpoint or parent is None else self.recipe.parents[parent]
            previous = source if before is None else rows[before]
            name = self.recipe.folder_name(number)
            made = None if checkpoint is None else records[checkpoint]
            rows.append(self._row(checkpoint, name, stage.stage, resources, source, previous, made))
        return [source, *rows]

    def _finished_later(self, reached: int) -> Iterator[dict[str, Any]]:
        """What an earlier run left on record of the stages after those of this one, as far as it counts."""
        for number in range(reached, len(self.recipe.stages)):
            stage, name = self.recipe.stages[number], self.recipe.folder_name(number)
            record = self.folder.finished(name, self.keys[number])
            if isinstance(stage, Evaluate):
                parent, key, _ = self.checkpoint_of(self.recipe.parents[number])
                known = self.evaluations.has(parent, key, stage.tasks)
                record = read_json(self.folder.path / f"{name}.json") if known else None
            if record is None:
                return
            yield record

    def _row(
        self,
        number: int | None,
        name: str,
        stage: str,
        resources: dict[str, Any],
        source: Row | None,
        previous: Row | None,
        made: dict[str, Any] | None = None,
    ) -> Row:
        checkpoint_name, key, _ = self.checkpoint_of(number)
        results = self.evaluations.known(checkpoint_name, key)
        if made is None:
            shape, size = shape_data(self.source.shape), sum(file.stat().st_size for file in self.source.files())
        else:  # the weights themselves may have been dropped
            shape, files = made["shape"], made["files"]
            size = sum(file["bytes"] for name, file in files.items() if name.endswith(".safetensors"))
        parameters = self.plan.checkpoints[0 if number is None else number + 1].shape.parameters
        return row(name, stage, shape, parameters, size, resources, results, source, previous)
