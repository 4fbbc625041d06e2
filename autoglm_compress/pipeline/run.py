"""Running a recipe: every stage in order, each finished whole or not at all."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter, resolve_source
from autoglm_compress.checkpoint.writer import sha256, write_json
from autoglm_compress.errors import UserError
from autoglm_compress.pipeline.calibration import calibration_batches, calibration_files, held_out_batches
from autoglm_compress.pipeline.evaluations import Evaluations, find_data, tasks_of
from autoglm_compress.pipeline.keys import calibration_key, hash_source, key_of, stage_keys
from autoglm_compress.pipeline.metrics import metrics_table, row
from autoglm_compress.pipeline.plan import SOURCE, plan_recipe, shape_data
from autoglm_compress.pipeline.resources import Resources
from autoglm_compress.pipeline.run_folder import LINEAGE, STAGE, RunFolder, read_json
from autoglm_compress.progress import Progress
from autoglm_compress.recipe import Recipe
from autoglm_compress.reconstruction.lineage import Lineage
from autoglm_compress.reconstruction.statistics import REVISION as STATISTICS_REVISION
from autoglm_compress.reconstruction.statistics import Statistics, measure
from autoglm_compress.report import draw_missing, write_report
from autoglm_compress.stages import StageContext
from autoglm_compress.stages.evaluate import Evaluate

SOURCE_FOLDER_NAME = f"00-{SOURCE}"
PACKAGES = ("autoglm-compress", "torch", "transformers", "safetensors", "compressed-tensors", "lm-eval")


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe."""

    output: Path
    device: str = "auto"
    first: str | None = None
    last: str | None = None
    fresh: bool = False


def run_recipe(recipe: Recipe, options: RunOptions, progress: Progress) -> Path:
    """Run a recipe and return the folder of its results.

    Raises:
        UserError: something about the recipe, the source, the output folder or the disk does not allow it; nothing
            is half-written.
    """
    return _Run(recipe, options, progress).run()


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


class _Run:
    def __init__(self, recipe: Recipe, options: RunOptions, progress: Progress) -> None:
        self.recipe = recipe
        self.options = options
        self.progress = progress
        self.device = choose_device(options.device)
        self.chosen = self._range()
        self.folder = RunFolder(options.output, recipe.name)
        self.calibration_files = calibration_files(recipe)
        self.plan = plan_recipe(recipe, options.output)
        self.source = Checkpoint(resolve_source(recipe.model.source, recipe.bases))
        self.source.require_tokenizer()
        self.records: list[dict[str, Any]] = []
        self.evaluations = Evaluations(recipe, find_data(recipe), self.folder, self.device)

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

    def run(self) -> Path:
        known = self.folder.manifest.get("source", {})
        same_folder = known.get("folder") == str(self.source.folder)
        self.source_files = hash_source(self.source, known["files"] if same_folder else {})
        self.calibration = calibration_key(self.recipe.calibration, self.calibration_files)
        self.source_key, self.keys = stage_keys(self.recipe, self.source_files, self.calibration)
        unfinished = [self.recipe.stages[number] for number in self._unfinished()]
        if self.options.fresh or any(stage.uses_calibration or stage.makes_quantized for stage in unfinished):
            _ = self.calibration_batches  # too little text is said before work starts, and before anything is deleted
        if self.options.fresh:
            self.folder.clear()
        self._announce()
        self._check_disk(self._unfinished())
        self._write_manifest()
        torch.manual_seed(self.recipe.seed)
        self._evaluate(None, tasks_of(self.recipe, self.chosen[-1]))
        for number in range(self.chosen[-1] + 1):
            self._run_stage(number)
            self._write_metrics()
            self._write_manifest()
        self.folder.tidy([*self._names()[self.chosen[-1] + 1 :], self._statistics_name()])
        self.progress.console.print(metrics_table(self._rows()))
        write_report(self.folder.path, self.progress)
        return self.folder.path

    def _names(self) -> list[str]:
        return [self.recipe.folder_name(number) for number in range(len(self.recipe.stages))]

    def _announce(self) -> None:
        """Say which stages are reused, which have to be done again and why, and what is left over."""
        left_over = self.folder.adopt(self._names(), self.keys)
        before = {entry["name"]: entry for entry in self.folder.manifest.get("stages", [])}
        for number, name in enumerate(self._names()):
            stage = self.recipe.stages[number]
            if not stage.makes_checkpoint or number > self.chosen[-1]:
                continue
            finished = self.folder.finished(name, self.keys[number])
            forced = self.options.first is not None and number >= self.chosen[0]
            if finished and not forced:
                self.progress.note(f"{name}: finished before, reused")
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

    def _unfinished(self) -> list[int]:
        """The stages, as far as this run goes, whose checkpoints are still to be made."""
        return [
            number
            for number, name in enumerate(self._names()[: self.chosen[-1] + 1])
            if self.recipe.stages[number].makes_checkpoint and not self.folder.finished(name, self.keys[number])
        ]

    def _check_disk(self, unfinished: Sequence[int]) -> None:
        kept = sum(self.plan.checkpoints[number + 1].disk for number in unfinished)
        needed = kept + (self.plan.scratch_bytes if unfinished else 0)
        if needed > self.plan.free_bytes:
            raise UserError(
                f"{self.folder.path}: the run needs {needed / 1e9:.2f} GB of disk and {self.plan.free_bytes / 1e9:.2f} "
                "GB are free. Free some, or give a folder on another disk with --output."
            )

    def _evaluate(self, number: int | None, tasks: Sequence[str]) -> dict[str, Any]:
        """Results of a stage's checkpoint, or of the source, by task."""
        name, key, folder = self._checkpoint_of(number)
        return self.evaluations.measure(name, key, lambda: Checkpoint(folder), tasks, self.progress)

    def _checkpoint_of(self, number: int | None) -> tuple[str, str, Path]:
        """Name, key and folder of a stage's checkpoint, or of the source."""
        if number is None:
            return SOURCE_FOLDER_NAME, self.source_key, self.source.folder
        name = self.recipe.folder_name(number)
        return name, self.keys[number], self.folder.path / name

    def _run_stage(self, number: int) -> None:
        stage, name = self.recipe.stages[number], self.recipe.folder_name(number)
        redo = self.options.first is not None and number in self.chosen
        if not stage.makes_checkpoint:
            if redo and isinstance(stage, Evaluate):
                self.evaluations.forget(self._checkpoint_of(self.recipe.parents[number])[0], stage.tasks)
            context = self._context(number, target=None, work=self.folder.work)
            stage.run(context)
            cost = self.evaluations.resources(self._checkpoint_of(self.recipe.parents[number])[0])
            self.records.append({"results": context.decisions, **cost})
            write_json(self.folder.path / f"{name}.json", {"name": name, "stage": stage.stage, **self.records[-1]})
            return
        finished = self.folder.finished(name, self.keys[number])
        if finished and not redo:
            stage.accept(finished["decisions"], self._checkpoint_of(self.recipe.parents[number])[2])
        self.records.append(finished if finished and not redo else self._make_checkpoint(number))
        draw_missing(self.folder.path / name / STAGE, self.progress)
        self._evaluate(number, self.recipe.evaluation.every_stage)

    def _rows(self) -> list[dict[str, Any]]:
        """A row for the source and for every stage so far, with all that was measured of its checkpoint."""
        source = self._row(None, SOURCE, SOURCE, self.evaluations.resources(SOURCE_FOLDER_NAME), None, None)
        rows: list[dict[str, Any]] = []
        for number, record in enumerate(self.records):
            stage, parent = self.recipe.stages[number], self.recipe.parents[number]
            resources = {field: record[field] for field in ("seconds", "peak_rss_bytes")}
            checkpoint = number if stage.makes_checkpoint else parent
            # What a stage that only looks is compared with is what the checkpoint it looks at is compared with.
            before = parent if stage.makes_checkpoint or parent is None else self.recipe.parents[parent]
            previous = source if before is None else rows[before]
            name = self.recipe.folder_name(number)
            rows.append(self._row(checkpoint, name, stage.stage, resources, source, previous))
        return [source, *rows]

    def _row(
        self,
        number: int | None,
        name: str,
        stage: str,
        resources: dict[str, Any],
        source: dict[str, Any] | None,
        previous: dict[str, Any] | None,
    ) -> dict[str, Any]:
        checkpoint_name, key, folder = self._checkpoint_of(number)
        checkpoint = Checkpoint(folder)
        size = sum(file.stat().st_size for file in checkpoint.files())
        results = self.evaluations.known(checkpoint_name, key)
        return row(name, stage, checkpoint.shape, size, resources, results, source, previous)

    def _write_metrics(self) -> None:
        write_json(self.folder.path / "metrics.json", {"recipe": self.recipe.name, "stages": self._rows()})

    def _make_checkpoint(self, number: int) -> dict[str, Any]:
        """Run one stage in its work folder and publish the result; returns its `stage.json`."""
        stage, name, key = self.recipe.stages[number], self.recipe.folder_name(number), self.keys[number]
        work, resumed = self.folder.begin(name, key)
        self.progress.note(f"{name}: {'going on where an earlier run stopped' if resumed else 'running'}")
        shape: ModelShape = self.plan.checkpoints[number + 1].shape
        target = CheckpointWriter(work / "checkpoint", units=shape.num_hidden_layers + 2)
        context = self._context(number, target, work / "scratch")
        with Resources() as resources:
            stage.run(context)
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
        folder = self._checkpoint_of(parent)[2]
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
            device=self.device,
            seed=self.recipe.seed,
            progress=self.progress,
            work=work,
        )

    @cached_property
    def calibration_batches(self) -> list[torch.Tensor]:
        return calibration_batches(self.recipe.calibration, self.calibration_files, self.source, self.progress)

    def _statistics_name(self) -> str:
        return f"statistics-{key_of([STATISTICS_REVISION, self.source_key, self.calibration])}"

    @cached_property
    def statistics(self) -> Statistics:
        folder = self.folder.work / self._statistics_name()
        folder.mkdir(parents=True, exist_ok=True)
        return measure(self.source, self.calibration_batches, folder, self.device, self.progress)

    def _write_manifest(self) -> None:
        stages = []
        for number, name in enumerate(self._names()):
            record = read_json(self.folder.path / name / STAGE) or {}
            finished = record.get("key") == self.keys[number]
            entry = {"name": name, "key": self.keys[number], "finished": finished}
            stages.append(entry | ({"files": record["files"]} if finished else {}))
        self.folder.write_manifest(
            {
                "recipe": self.recipe.as_data(),
                "source": {"folder": str(self.source.folder), "key": self.source_key, "files": self.source_files},
                "calibration_key": self.calibration,
                "seed": self.recipe.seed,
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "versions": package_versions(),
                "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "stages": stages,
            }
        )


@cache
def package_versions() -> dict[str, str]:
    """The versions of this package, of those that results depend on, and of Python."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
