"""The loop over the stages of a recipe: each is finished whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from autoglm_compress.hashing import sha256
from autoglm_compress.pipeline.contexts import Contexts, measure_statistics, shared_context
from autoglm_compress.pipeline.inputs import RunInputs
from autoglm_compress.pipeline.manifest import write_manifest
from autoglm_compress.pipeline.metrics import metrics_table
from autoglm_compress.pipeline.metrics_rows import MetricsRows
from autoglm_compress.pipeline.preparation import Preparation, prepare
from autoglm_compress.pipeline.retention import passing, users
from autoglm_compress.records.files import LINEAGE, METRICS, STAGE
from autoglm_compress.records.metrics import Metrics, Row
from autoglm_compress.records.stage import FileRecord, Shape, StageRecord
from autoglm_compress.report import write_report
from autoglm_compress.resources import Resources
from autoglm_compress.stages import Makes, Stage, StageContext
from autoglm_compress.stages.drawing import draw, draw_missing
from autoglm_compress.versions import package_versions, result_versions


def run_stages(inputs: RunInputs) -> None:
    """Run the stages in the first process, and write their records."""
    new = not inputs.folder.path.exists()
    preparation = prepare(inputs) if new else None  # before the folder exists: a refused run leaves nothing
    with inputs.folder.claimed():
        runner = _Runner(preparation or prepare(inputs))
        runner.run()
    console = inputs.runtime.progress.console
    console.print(f"results: {inputs.folder.path}", soft_wrap=True, highlight=False, markup=False)


def follow(inputs: RunInputs) -> None:
    """Follow the first process, which names a stage by its number or a measurement by its folder's name."""
    while (work := inputs.runtime.processes.tell(None)) is not None:
        if isinstance(work, str):
            measure_statistics(inputs, work)
            continue
        torch.manual_seed(inputs.recipe.seed)
        scratch = inputs.folder.stage_work(inputs.recipe.folder_name(work)) / "scratch"
        inputs.recipe.stages[work].follow(shared_context(inputs, work, scratch))


class _Runner:
    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._inputs = preparation.inputs
        self._contexts = Contexts(preparation)
        self._records: list[StageRecord] = []

    def run(self) -> None:
        inputs, last = self._inputs, self._inputs.chosen[-1]
        write_manifest(self._preparation)
        torch.manual_seed(inputs.recipe.seed)
        self._contexts.evaluate(None, inputs.recipe.tasks(last))
        for number in range(last + 1):
            self._records.append(self._finished(number) or self._make(number))
            self._look_at(number)
            self._drop_served(number)
            self._write_metrics()
            write_manifest(self._preparation)
        inputs.folder.tidy([*inputs.names[last + 1 :], self._contexts.statistics_name])
        inputs.runtime.progress.console.print(metrics_table(self._rows()))
        write_report(inputs.folder.path, draw, inputs.runtime.progress)

    def _finished(self, number: int) -> StageRecord | None:
        """The `stage.json` of a finished stage, after its result passed the stage's present acceptance limits."""
        schedule, recipe = self._preparation.schedule, self._inputs.recipe
        record = None if number in schedule.to_make else schedule.finished(number)
        if record is not None:
            before = self._preparation.checkpoint(recipe.parents[number])
            recipe.stages[number].accept(record.decisions, before.folder)
        return record

    def _make(self, number: int) -> StageRecord:
        """Run one stage in its work folder and publish the result; returns its `stage.json`."""
        inputs, folder = self._inputs, self._inputs.folder
        stage, name, key = inputs.recipe.stages[number], inputs.names[number], self._preparation.keys.stages[number]
        work, resumed = folder.begin(name, key, result_versions())
        resources = Resources(work / "spent.json")
        if self._preparation.schedule.needs_weights(number):
            how = "going on where an earlier run stopped" if resumed else "running"
            inputs.runtime.progress.note(f"{name}: {how}")
        result = folder.stage_result(name)
        context = self._contexts.make(number, work / "scratch", result)
        if stage.runs_in_all_processes:
            inputs.runtime.processes.tell(number)
        with resources:
            stage.run(context)
        for warning in context.warnings:
            inputs.runtime.progress.note(f"warning: {name}: {warning}")
        inputs.source.require_unchanged()
        context.require_source_unchanged()
        if stage.makes is Makes.CHECKPOINT:
            context.lineage.save(result / LINEAGE)
        spent = resources.as_data()
        if stage.evaluates:  # the tasks may have been evaluated before the stage asked for them
            spent = inputs.evaluations.resources(self._preparation.checkpoint(inputs.recipe.parents[number]).name)
        record = self._record(number, context, result, spent)
        record.write(result / STAGE)
        folder.publish(name)
        return record

    def _record(self, number: int, context: StageContext, result: Path, spent: dict[str, Any]) -> StageRecord:
        """The `stage.json` of a stage that has run and `spent` these resources."""
        inputs, stage, parent = self._inputs, self._inputs.recipe.stages[number], self._inputs.recipe.parents[number]
        files = sorted(path for path in result.rglob("*") if path.is_file() and path != result / STAGE)
        before = Shape.of(inputs.source.shape) if parent is None else self._records[parent].shape
        left_out: dict[str, Any] = {}
        if parent is None and inputs.source.left_out:
            left_out["left_out"] = list(inputs.source.left_out)
        return StageRecord(
            name=inputs.names[number],
            key=self._preparation.keys.stages[number],
            makes=stage.makes.value,
            options=stage.model_dump(mode="json", by_alias=True),
            parent=self._preparation.checkpoint(parent).name,
            shape_before=before,
            shape=Shape.of(context.shape),
            decisions=context.decisions,
            warnings=[*inputs.plan.checkpoints[number + 1].warnings, *context.warnings],
            linears=self._linears(stage, context.decisions),
            files={
                path.relative_to(result).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
                for path in files
            },
            versions=package_versions(),
            **left_out,
            **spent,
        )

    def _linears(self, stage: Stage, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        """Measures of linears for tables. An error here does not fail the stage."""
        try:
            return stage.linears(decisions)
        except Exception as error:  # of another package's stage too
            note = f"warning: {stage.label}: no table of linears: {type(error).__name__}: {error}"
            self._inputs.runtime.progress.note(note)
            return []

    def _look_at(self, number: int) -> None:
        """Draw a stage's decisions, and evaluate its checkpoint."""
        draw_missing(self._inputs.folder.path / self._inputs.names[number] / STAGE, self._inputs.runtime.progress)
        if self._inputs.recipe.stages[number].makes is Makes.CHECKPOINT:
            self._contexts.evaluate(number, self._inputs.recipe.evaluation.every_stage)

    def _drop_served(self, reached: int) -> None:
        """Delete the weights that the recipe does not keep and that no stage needs after this one."""
        recipe, schedule = self._inputs.recipe, self._preparation.schedule
        for number in passing(recipe):
            later = [user for user in users(recipe, number) if user > reached]
            if number <= reached and not any(schedule.needs_weights(user) for user in later):
                self._records[number] = self._inputs.folder.drop(self._inputs.names[number], self._records[number])

    def _rows(self) -> list[Row]:
        inputs, preparation = self._inputs, self._preparation
        rows = MetricsRows(inputs.recipe, inputs.plan, inputs.source, inputs.evaluations, preparation.checkpoint)
        later = range(len(self._records), len(inputs.recipe.stages))
        return rows.of([*self._records, *preparation.schedule.finished_in_a_row(later)])

    def _write_metrics(self) -> None:
        metrics = Metrics(recipe=self._inputs.recipe.name, stages=self._rows())
        metrics.write(self._inputs.folder.path / METRICS)
