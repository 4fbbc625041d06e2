"""A whole run, read from the records in its folder."""

from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.errors import UserError
from autoglm_compress.records.evaluation import EvaluationRecord
from autoglm_compress.records.files import (
    EVALUATIONS,
    MANIFEST,
    METRICS,
    RUN_AGAIN,
    SOURCE,
    SOURCE_FOLDER_NAME,
    STAGE,
    read_record,
)
from autoglm_compress.records.manifest import Manifest, read_manifest
from autoglm_compress.records.metrics import Row, read_metrics
from autoglm_compress.records.stage import StageRecord, read_stage


@dataclass(frozen=True)
class Run:
    """A run: its rows in order, and by the name of a row its `stage.json` and its evaluation."""

    folder: Path
    recipe: str
    rows: list[Row]
    manifest: Manifest
    stages: dict[str, StageRecord]
    evaluations: dict[str, EvaluationRecord]

    @property
    def source(self) -> Row | None:
        """The row of the source."""
        return next((row for row in self.rows if row.stage == SOURCE), None)


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        UserError: it is not one, no stage of it is finished, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder that `autoglm-compress run` wrote.")
    metrics_file, manifest_file = folder / METRICS, folder / MANIFEST
    if not metrics_file.exists():
        hint = (
            "no stage of this run is finished yet. Run the recipe first."
            if manifest_file.exists()
            else "not the folder of a run. Give a folder that `autoglm-compress run` wrote."
        )
        raise UserError(f"{metrics_file}: no such file: {hint}")
    metrics = read_metrics(metrics_file)
    files = {row.name: SOURCE_FOLDER_NAME if row.name == SOURCE else row.name for row in metrics.stages}
    unsafe = [name for name in files if Path(name).name != name]
    if unsafe:
        raise UserError(f"{metrics_file}: stages: the name {unsafe[0]!r} is not that of a folder. {RUN_AGAIN}")
    stage_files = {name: folder / file / STAGE for name, file in files.items()}
    evaluation_files = {name: folder / EVALUATIONS / f"{file}.json" for name, file in files.items()}
    return Run(
        folder=folder,
        recipe=metrics.recipe,
        rows=metrics.stages,
        manifest=read_manifest(manifest_file) if manifest_file.exists() else Manifest(),
        stages={name: read_stage(file) for name, file in stage_files.items() if file.exists()},
        evaluations={
            name: read_record(EvaluationRecord, file) for name, file in evaluation_files.items() if file.exists()
        },
    )
