"""What a run gives its stages: checkpoints, text, statistics, evaluations."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.forward.statistics import REVISION as STATISTICS_REVISION
from autoglm_compress.forward.statistics import Statistics, measure
from autoglm_compress.hashing import key_of
from autoglm_compress.pipeline.inputs import RunInputs
from autoglm_compress.pipeline.preparation import Preparation
from autoglm_compress.pipeline.run_folder import LINEAGE
from autoglm_compress.stages import Makes, StageContext
from autoglm_compress.versions import result_versions


class Contexts:
    """Makes the context of each stage. Whatever several stages ask for is measured once.

    Args:
        inputs: what the run works with.
        preparation: what the first process has prepared; the other processes evaluate nothing and need none.
    """

    def __init__(self, inputs: RunInputs, preparation: Preparation | None = None) -> None:
        self._inputs = inputs
        self._preparation = preparation

    def make(self, number: int, work: Path, result: Path | None) -> StageContext:
        """The context of stage `number`.

        Args:
            number: of the stage in the recipe.
            work: a folder of the stage's own.
            result: the folder that its result is put in; None in all processes but the first.
        """
        inputs = self._inputs
        stage, parent = inputs.recipe.stages[number], inputs.recipe.parents[number]
        folder = inputs.source.folder if parent is None else inputs.folder.path / inputs.recipe.folder_name(parent)
        shape = inputs.plan.checkpoints[number + 1].shape
        target = None
        if result is not None and stage.makes is Makes.CHECKPOINT:
            target = CheckpointWriter(result, units=shape.num_hidden_layers + 2)
        return StageContext(
            origin=inputs.source,
            source_folder=folder,
            target=target,
            result=result,
            shape=shape,
            lineage=Lineage.of_source(inputs.source.shape) if parent is None else Lineage.load(folder / LINEAGE),
            text=inputs.text,
            statistics=lambda: self.statistics,
            evaluate=lambda tasks: self.evaluate(parent, tasks),
            open_checkpoint=inputs.open_other,
            runtime=inputs.runtime,
            seed=inputs.recipe.seed,
            work=work,
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
        return self.measure(self.statistics_name)

    def measure(self, name: str) -> Statistics:
        """Measure the source's statistics into a folder within `.work`, as all processes do together."""
        folder = self._inputs.folder.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return measure(self._inputs.source, self._inputs.text.batches, folder, self._inputs.runtime)
