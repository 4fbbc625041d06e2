"""What the records of a run tell of a checkpoint: the recipe, and the stages that led to it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from autoglm_compress.checkpoint.source import CARD
from autoglm_compress.records.files import MANIFEST, METRICS, SOURCE, SOURCE_FOLDER_NAME
from autoglm_compress.records.metrics import Row
from autoglm_compress.report.chain import parents
from autoglm_compress.report.run_record import Run, read_run
from autoglm_compress.report.run_tables import stage_table

IN_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""Where the hub's client keeps the files of OWNER/NAME."""


@dataclass(frozen=True)
class History:
    """A run, of which only the rows are left that led from the source to one checkpoint."""

    run: Run

    @property
    def row(self) -> Row:
        """The checkpoint's row."""
        return self.run.rows[-1]

    @property
    def base_model(self) -> str | None:
        """The source's id on the hub; None if it did not come from there."""
        found = IN_HUB_CACHE.search(self.run.manifest.source.folder or "")
        return f"{found[1]}/{found[2]}" if found else None

    @property
    def license(self) -> str | None:
        """The license that the source's card names; None if there is no card, or none in it."""
        folder = self.run.manifest.source.folder
        return card_license(Path(folder)) if folder else None

    def recipe(self) -> dict[str, Any]:
        """The recipe as it may be shown to everybody: paths of this machine are cut to their last name."""
        shown = _shown(self.run.manifest.recipe)
        if self.base_model and isinstance(shown.get("model"), dict):
            shown["model"]["source"] = self.base_model
        return shown

    def stages(self) -> list[list[str]]:
        """The stages that led to the checkpoint as a table, headings first."""
        table = stage_table(self.run)
        cells = [[f"{cell.text} {cell.stderr_text}".strip() for cell in row] for row in table.rows]
        return [[column.heading for column in table.columns], *cells]


def history(folder: Path) -> History | None:
    """The history of a checkpoint in the folder of a run; None if it is in none, or not on record there yet.

    Raises:
        UserError: a record of the run is damaged.
    """
    place = folder.absolute().parent
    if not ((place / MANIFEST).exists() and (place / METRICS).exists()):
        return None
    run = read_run(place)
    by_name = {row.name: row for row in run.rows}
    before = parents(run)
    stage = run.stages.get(folder.name)
    if folder.name not in before and stage and stage.parent:  # an artifact, which is not among the checkpoints
        before[folder.name] = SOURCE if stage.parent == SOURCE_FOLDER_NAME else stage.parent
    rows: list[Row] = []
    name: str | None = folder.name
    while name in by_name:
        rows.insert(0, by_name[name])
        name = before.get(name)
    return History(replace(run, rows=rows)) if rows else None


def card_license(folder: Path) -> str | None:
    """The license in the metadata of a folder's card; None if there is none."""
    try:
        _, opening, rest = (folder / CARD).read_text(encoding="utf-8").partition("---\n")
        metadata = yaml.safe_load(rest.partition("\n---")[0]) if opening else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = metadata.get("license") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _shown(value: Any) -> Any:
    """Plain data without what is None, and without the folders of absolute paths."""
    if isinstance(value, dict):
        return {name: _shown(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    absolute = isinstance(value, str) and (value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute())
    return PureWindowsPath(value).name if absolute else value
