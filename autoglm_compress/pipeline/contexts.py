"""The contexts of stages: checkpoints, text, statistics, evaluations."""

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.forward.statistics import REVISION as STATISTICS_REVISION
from autoglm_compress.forward.statistics import Statistics, measure
from autoglm_compress.hashing import key_of
from autoglm_compress.pipeline.decided import decided, planned_after
from autoglm_compress.pipeline.inputs import RunInputs
from autoglm_compress.pipeline.preparation import Preparation
from autoglm_compress.records.files import LINEAGE, STAGE, found
from autoglm_compress.records.stage import StageRecord
from autoglm_compress.stages import SharedContext, StageContext
from autoglm_compress.versions import result_versions


def shared_context(inputs: RunInputs, number: int, work: Path) -> SharedContext:
    """The context of stage `number` of the recipe in a process that only takes part; `work` is the stage's own."""
    parent = inputs.recipe.parents[number]
    folder = inputs.source.folder if parent is None else inputs.folder.path / inputs.recipe.folder_name(parent)
    return SharedContext(
        origin=inputs.source,
        source_folder=folder,
        shape=_shape(inputs, number),
        lineage=Lineage.of_source(inputs.source.shape) if parent is None else Lineage.load(folder / LINEAGE),
        text=inputs.text,
        open_checkpoint=inputs.open_other,
        runtime=inputs.runtime,
        seed=inputs.recipe.seed,
        work=work,
    )


def _shape(inputs: RunInputs, number: int) -> ModelShape:
    """The shape that stage `number` makes, as far as it is known when the stages before it are done."""
    parent, after = inputs.recipe.parents[number], inputs.plan.checkpoints[number + 1].shape
    if parent is None:
        return after
    planned = inputs.plan.checkpoints[parent + 1].shape
    record = found(StageRecord, inputs.folder.path / inputs.names[parent] / STAGE)
    before = decided(planned, None if record is None else record.shape)
    return after if before is planned else planned_after(inputs.recipe.stages[number], inputs.names[number], before)


def measure_statistics(inputs: RunInputs, name: str) -> Statistics:
    """Measure the source's statistics into a folder within `.work`, as all processes do together."""
    folder = inputs.folder.work / name
    folder.mkdir(parents=True, exist_ok=True)
    return measure(inputs.source, inputs.text.batches, folder, inputs.runtime)


class Contexts:
    """Makes the context of each stage in the first process. Whatever several stages ask for is measured once."""

    def __init__(self, preparation: Preparation) -> None:
        self._inputs = preparation.inputs
        self._preparation = preparation

    def make(self, number: int, work: Path, result: Path) -> StageContext:
        """The context of stage `number`.

        Args:
            number: of the stage in the recipe.
            work: a folder of the stage's own.
            result: the folder that its result is put in.
        """
        parent = self._inputs.recipe.parents[number]
        shared = shared_context(self._inputs, number, work)
        return StageContext(
            **{each.name: getattr(shared, each.name) for each in fields(shared)},
            result=result,
            statistics=lambda: self.statistics,
            evaluate=lambda tasks: self.evaluate(parent, tasks),
        )

    def evaluate(self, number: int | None, tasks: Sequence[str]) -> dict[str, Any]:
        """Results of a stage's checkpoint, or of the source, by task. Known results are not measured again."""
        checkpoint = self._preparation.checkpoint(number)
        return self._inputs.evaluations.results(
            checkpoint.name, checkpoint.key, lambda: Checkpoint(checkpoint.folder, self._inputs.source.family), tasks
        )

    @property
    def statistics_name(self) -> str:
        """The folder within `.work` that the source's statistics are in."""
        keys = self._preparation.keys
        return f"statistics-{key_of([STATISTICS_REVISION, keys.source, keys.calibration, result_versions()])}"

    @cached_property
    def statistics(self) -> Statistics:
        """The source's statistics, for a stage that the first process runs. All processes measure them."""
        self._inputs.runtime.processes.tell(self.statistics_name)
        return measure_statistics(self._inputs, self.statistics_name)
