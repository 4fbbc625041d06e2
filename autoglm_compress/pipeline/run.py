"""Running a recipe: every stage in order, each finished whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter, resolve_source
from autoglm_compress.checkpoint.writer import sha256, write_json
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.errors import UserError
from autoglm_compress.forward.statistics import REVISION as STATISTICS_REVISION
from autoglm_compress.forward.statistics import Statistics, measure
from autoglm_compress.pipeline.calibration import (
    calibration_batches,
    calibration_files,
    held_out_batches,
    training_text,
)
from autoglm_compress.pipeline.evaluations import Evaluations, find_data, tasks_of
from autoglm_compress.pipeline.keys import calibration_key, hash_source, key_of, key_of_files, stage_keys
from autoglm_compress.pipeline.metrics import metrics_table
from autoglm_compress.pipeline.metrics_rows import SOURCE_FOLDER_NAME, MetricsRows
from autoglm_compress.pipeline.plan import bytes_of, plan_recipe, shape_data
from autoglm_compress.pipeline.resources import Resources
from autoglm_compress.pipeline.retention import most_bytes, passing, users
from autoglm_compress.pipeline.run_folder import LINEAGE, STAGE, RunFolder, disk_problem, read_json
from autoglm_compress.pipeline.schedule import Schedule
from autoglm_compress.pipeline.versions import made_elsewhere, package_versions, result_versions
from autoglm_compress.processes import Processes, choose_device, join_processes
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe
from autoglm_compress.report import write_report
from autoglm_compress.runtime import Runtime
from autoglm_compress.stages import StageContext
from autoglm_compress.stages.drawing import draw, draw_missing
from autoglm_compress.stages.evaluate import Evaluate


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe."""

    output: Path
    device: str = "auto"
    first: str | None = None
    last: str | None = None
    fresh: bool = False
    memory_limit: str | None = None


def run_recipe(recipe: Recipe, options: RunOptions, progress: Progress) -> Path:
    """Run a recipe and return the folder of its results.

    Raises:
        UserError: something about the recipe, the source, the output folder or the disk does not allow it, or another
            process of the run has failed; nothing is half-written.
    """
    processes, device = join_processes(choose_device(options.device))
    try:
        if processes.is_first:
            run = _Run(recipe, options, progress, device, processes)
            run.run()
            processes.tell(None)
        else:
            run = _Run(recipe, options, Progress(Console(quiet=True)), device, processes)
            run.follow()
    except OSError as error:
        if problem := disk_problem(options.output, error):
            raise UserError(problem) from None
        raise
    return run.folder.path


class _Run:
    def __init__(
        self, recipe: Recipe, options: RunOptions, progress: Progress, device: torch.device, processes: Processes
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.progress = progress
        self.device = device
        self.processes = processes
        self.runtime = Runtime(device, progress, processes)
        self.chosen = self._range()
        self.folder = RunFolder(options.output, recipe.name)
        self.calibration_files = calibration_files(recipe)
        self.plan = plan_recipe(recipe, options.output)
        self.source = Checkpoint(resolve_source(recipe.model.source, recipe.bases))
        self.source.require_tokenizer()
        self.records: list[dict[str, Any]] = []
        self.others: dict[str, dict[str, Any]] = {}
        self.evaluations = Evaluations(recipe, find_data(recipe), self.folder, self.runtime)

    def _range(self) -> range:
        labels = self.recipe.labels()
        for option, label in (("--from", self.options.first), ("--until", self.options.last)):
            if label is not None and label not in labels:
                raise UserError(f"{option}: no stage {label!r} in the recipe; there are {', '.join(labels)}.")
        first = labels.index(self.options.first) if self.options.first else 0
        last = labels.index(self.options.last) if self.options.last else len(labels) - 1
        if first > 0 and self.options.fresh:
            raise UserError("--fresh starts from the first stage, and cannot go with --from.")
        if first > last:
            raise UserError(f"--from {self.options.first} comes after --until {self.options.last}.")
        return range(first, last + 1)

    def follow(self) -> None:
        """Take part in what the first process says: a stage by its number, or a measurement by its folder's name."""
        while (work := self.processes.tell(None)) is not None:
            if isinstance(work, str):
                self._measure(work)
                continue
            name = self.recipe.folder_name(work)
            torch.manual_seed(self.recipe.seed)
            self.recipe.stages[work].run(self._context(work, None, self.folder.stage_work(name) / "scratch"))

    def run(self) -> None:
        """Run the stages, and write what is said of them."""
        new = not self.folder.path.exists()
        if new:
            self._prepare()  # before there is a folder: what is refused leaves nothing behind
        with self.folder.claimed():
            if not new:
                self._prepare()
            self._write_manifest()
            torch.manual_seed(self.recipe.seed)
            self._evaluate(None, tasks_of(self.recipe, self.chosen[-1]))
            for number in range(self.chosen[-1] + 1):
                self._run_stage(number)
                self._drop_served(number)
                self._write_metrics()
                self._write_manifest()
            self.folder.tidy([*self._names()[self.chosen[-1] + 1 :], self._statistics_name()])
            self.progress.console.print(metrics_table(self._rows().of(self.records)))
            write_report(self.folder.path, draw, self.progress)
        self.progress.console.print(f"results: {self.folder.path}", soft_wrap=True, highlight=False, markup=False)

    def _prepare(self) -> None:
        """See what is to be done, and refuse what cannot be; deletes what --fresh says."""
        self.source_files = _hashed(self.source, self.folder.manifest.get("source", {}))
        known = self.folder.manifest.get("others", {})
        for stage in self.recipe.stages[: self.chosen[-1] + 1]:
            for option, name in stage.other_checkpoints.items():
                other = self._open(name, option)
                self.others[name] = {"folder": str(other.folder), "files": _hashed(other, known.get(name, {}))}
        self.calibration = calibration_key(self.recipe.calibration, self.calibration_files)
        others = {name: key_of_files(other["files"]) for name, other in self.others.items()}
        self.source_key, self.keys = stage_keys(self.recipe, self.source_files, self.calibration, others)
        left_over = [] if self.options.fresh else self.folder.adopt(self._names(), self.keys)
        again = self.chosen if self.options.fresh or self.options.first is not None else ()
        self.schedule = Schedule(self.recipe, self.folder, self.keys, self._known, again, self.chosen[-1])
        to_make = [self.recipe.stages[number] for number in self.schedule.to_make]
        if any(stage.uses_calibration or stage.makes_quantized for stage in to_make):
            # Too little text is said before work starts, and before anything is deleted.
            self.processes.require_rows(sum(map(len, self.calibration_batches)))
        for stage in to_make:
            stage.check_processes(self.processes)
        self._check_memory()
        if self.options.fresh:
            self.folder.clear()
        self._announce(left_over)
        self._check_disk()

    def _names(self) -> list[str]:
        return [self.recipe.folder_name(number) for number in range(len(self.recipe.stages))]

    def _announce(self, left_over: Sequence[Path]) -> None:
        """Say which stages are reused, which have to be done again and why, and what is left over."""
        before = {entry["name"]: entry for entry in self.folder.manifest.get("stages", [])}
        for number, name in enumerate(self._names()):
            stage = self.recipe.stages[number]
            if not stage.makes_checkpoint or number > self.chosen[-1]:
                continue
            finished = self.folder.finished(name, self.keys[number])
            forced = self.options.first is not None and number >= self.chosen[0]
            if finished and not forced and number in self.schedule.to_make:
                self.progress.note(f"{name}: finished before, but not kept: done again for those that need it")
            elif finished and not forced:
                self.progress.note(f"{name}: finished before, reused{made_elsewhere(finished, stage.label)}")
            elif number < self.chosen[0]:
                first = self.options.first
                raise UserError(f"--from {first}: {name} is not finished yet. Run without --from, or from it.")
            elif forced:
                self.progress.note(f"{name}: done again (--from {self.options.first})")
            elif name in before and before[name]["key"] != self.keys[number]:
                self.progress.note(f"{name}: its options, or what it depends on, changed: done again")
            elif name in before and before[name]["finished"]:
                self.progress.note(f"{name}: missing or damaged files: done again")
        for folder in left_over:
            self.progress.note(f"{folder.name}: not in the recipe (any more); delete it if you do not need it")
        for warning in self.plan.stage_warnings():
            self.progress.note(f"warning: {warning}")

    def _known(self, number: int | None, tasks: Sequence[str]) -> bool:
        """Whether a checkpoint was evaluated on tasks, and that counts."""
        name, key, _ = self._checkpoint_of(number)
        return self.evaluations.has(name, key, tasks)

    def _drop_served(self, reached: int) -> None:
        """Delete the weights that the recipe does not keep and, this stage being done, nothing needs any more."""
        for number in passing(self.recipe):
            later = [user for user in users(self.recipe, number) if user > reached]
            if number <= reached and all(self.schedule.done(user) for user in later):
                self.records[number] = self.folder.drop(self.recipe.folder_name(number), self.records[number])

    def _check_memory(self) -> None:
        if self.options.memory_limit is not None:
            looking = [number for number in self.chosen if not self.recipe.stages[number].makes_checkpoint]
            self.plan.require_memory(bytes_of(self.options.memory_limit), [*self.schedule.to_make, *looking])

    def _check_disk(self) -> None:
        sizes, to_make = [checkpoint.disk for checkpoint in self.plan.checkpoints[1:]], self.schedule.to_make
        needed = most_bytes(self.recipe, sizes, to_make, self.schedule.with_weights())
        needed += self.plan.scratch_bytes if to_make else 0
        if needed > self.plan.free_bytes:
            hint = ", or keep fewer checkpoints with --set keep=none" if self.recipe.keep != "none" else ""
            raise UserError(
                f"{self.folder.path}: the run needs {needed / 1e9:.2f} GB of disk and {self.plan.free_bytes / 1e9:.2f} "
                f"GB are free. Free some, or give a folder on another disk with --output{hint}."
            )

    def _evaluate(self, number: int | None, tasks: Sequence[str]) -> dict[str, Any]:
        """Results of a stage's checkpoint, or of the source, by task."""
        name, key, folder = self._checkpoint_of(number)
        return self.evaluations.measure(name, key, lambda: Checkpoint(folder), tasks)

    def _open(self, name: str, option: str) -> Checkpoint:
        """A checkpoint that an option of a stage names."""
        return Checkpoint(resolve_source(name, self.recipe.bases, option))

    def _checkpoint_of(self, number: int | None) -> tuple[str, str, Path]:
        """Name, key and folder of a stage's checkpoint, or of the source."""
        if number is None:
            return SOURCE_FOLDER_NAME, self.source_key, self._folder_of(number)
        return self.recipe.folder_name(number), self.keys[number], self._folder_of(number)

    def _folder_of(self, number: int | None) -> Path:
        return self.source.folder if number is None else self.folder.path / self.recipe.folder_name(number)

    def _run_stage(self, number: int) -> None:
        stage, name = self.recipe.stages[number], self.recipe.folder_name(number)
        redo = self.options.first is not None and number in self.chosen
        if not stage.makes_checkpoint:
            if redo and isinstance(stage, Evaluate):
                self.evaluations.forget(self._checkpoint_of(self.recipe.parents[number])[0], stage.tasks)
            parent = self.recipe.parents[number]
            if self.schedule.done(number):  # what is known needs no checkpoint, which may have been dropped
                results = self._evaluate(parent, stage.tasks)
            else:
                context = self._context(number, target=None, work=self.folder.work)
                stage.run(context)
                results = context.decisions
            self.records.append({"results": results, **self.evaluations.resources(self._checkpoint_of(parent)[0])})
            write_json(self.folder.path / f"{name}.json", {"name": name, "stage": stage.stage, **self.records[-1]})
            return
        finished = None if number in self.schedule.to_make else self.schedule.finished(number)
        if finished:
            stage.accept(finished["decisions"], self._folder_of(self.recipe.parents[number]))
        self.records.append(finished or self._make_checkpoint(number))
        draw_missing(self.folder.path / name / STAGE, self.progress)
        self._evaluate(number, self.recipe.evaluation.every_stage)

    def _rows(self) -> MetricsRows:
        return MetricsRows(
            self.recipe, self.plan, self.source, self.folder, self.keys, self.evaluations, self._checkpoint_of
        )

    def _write_metrics(self) -> None:
        rows = self._rows().of(self.records)
        write_json(self.folder.path / "metrics.json", {"recipe": self.recipe.name, "stages": rows})

    def _make_checkpoint(self, number: int) -> dict[str, Any]:
        """Run one stage in its work folder and publish the result; returns its `stage.json`."""
        stage, name, key = self.recipe.stages[number], self.recipe.folder_name(number), self.keys[number]
        work, resumed = self.folder.begin(name, key, result_versions())
        resources = Resources(work / "spent.json")
        self.progress.note(f"{name}: {'going on where an earlier run stopped' if resumed else 'running'}")
        shape: ModelShape = self.plan.checkpoints[number + 1].shape
        target = CheckpointWriter(work / "checkpoint", units=shape.num_hidden_layers + 2)
        context = self._context(number, target, work / "scratch")
        if stage.runs_in_all_processes:
            self.processes.tell(number)
        with resources:
            stage.run(context)
        for checkpoint in (self.source, context.source):
            checkpoint.require_unchanged()
        context.lineage.save(target.folder / LINEAGE)
        files = sorted(path for path in target.folder.iterdir() if STAGE not in path.name)
        record = {
            "name": name,
            "key": key,
            "options": stage.model_dump(mode="json", by_alias=True),
            "parent": self._checkpoint_of(self.recipe.parents[number])[0],
            "shape_before": shape_data(context.source.shape),
            "shape": shape_data(context.shape),
            "decisions": context.decisions,
            "linears": stage.linears(context.decisions),
            "warnings": list(self.plan.checkpoints[number + 1].warnings),
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
            "versions": package_versions(),
            **resources.as_data(),
        }
        write_json(target.folder / STAGE, record)
        self.folder.publish(name)
        return record

    def _context(self, number: int, target: CheckpointWriter | None, work: Path) -> StageContext:
        parent = self.recipe.parents[number]
        folder = self._folder_of(parent)
        source = Checkpoint(folder)
        return StageContext(
            origin=self.source,
            source=source,
            target=target,
            shape=self.plan.checkpoints[number + 1].shape,
            lineage=Lineage.of_source(source.shape) if parent is None else Lineage.load(folder / LINEAGE),
            statistics=lambda: self.statistics,
            calibration_batches=lambda: self.calibration_batches,
            held_out_batches=lambda: held_out_batches(
                self.recipe.calibration, self.calibration_files, self.source, self.progress
            ),
            evaluate=lambda tasks: self._evaluate(parent, tasks),
            training_text=lambda tokens, sequence_length: training_text(
                self.recipe.calibration, self.calibration_files, self.source, tokens, sequence_length
            ),
            open_checkpoint=self._open,
            runtime=self.runtime,
            seed=self.recipe.seed,
            work=work,
        )

    @cached_property
    def calibration_batches(self) -> list[torch.Tensor]:
        return calibration_batches(self.recipe.calibration, self.calibration_files, self.source, self.progress)

    def _statistics_name(self) -> str:
        key = key_of([STATISTICS_REVISION, self.source_key, self.calibration, result_versions()])
        return f"statistics-{key}"

    @cached_property
    def statistics(self) -> Statistics:
        """The source's, for a stage that the first process runs."""
        name = self._statistics_name()
        self.processes.tell(name)
        return self._measure(name)

    def _measure(self, name: str) -> Statistics:
        folder = self.folder.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return measure(self.source, self.calibration_batches, folder, self.runtime)

    def _write_manifest(self) -> None:
        stages = []
        for number, name in enumerate(self._names()):
            record = read_json(self.folder.path / name / STAGE) or {}
            finished = record.get("key") == self.keys[number]
            entry = {"name": name, "key": self.keys[number], "finished": finished}
            kept = {field: record[field] for field in ("files", "dropped") if finished and field in record}
            stages.append(entry | kept)
        self.folder.write_manifest(
            {
                "recipe": self.recipe.as_data(),
                "source": {"folder": str(self.source.folder), "key": self.source_key, "files": self.source_files},
                "others": self.others,
                "calibration_key": self.calibration,
                "seed": self.recipe.seed,
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "processes": self.processes.count,
                "versions": package_versions(),
                "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "stages": stages,
            }
        )


def _hashed(checkpoint: Checkpoint, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `hash_source` says of a checkpoint, given what a manifest knows of one of that name."""
    return hash_source(checkpoint, known["files"] if known.get("folder") == str(checkpoint.folder) else {})
