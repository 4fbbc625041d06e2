"""The result of `run` in Python."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from autoglm_compress.errors import UserError
from autoglm_compress.records.files import METRICS, SOURCE
from autoglm_compress.records.metrics import Row, read_metrics


class RunResult(BaseModel):
    """The folder of a run, and a row for the source and for each finished stage, as `metrics.json` has them."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    rows: list[Row]

    def row(self, label: str) -> Row:
        """The row of a stage by its label in the recipe (`name:`, or else `stage:`), or of `source`.

        Raises:
            UserError: there is none.
        """
        for row in self.rows:
            if row.label == label:
                return row
        known = ", ".join(row.label for row in self.rows)
        raise UserError(f"{self.folder}: no row {label!r}; there are {known}.")

    def checkpoint(self, label: str) -> Path:
        """The folder of a stage's result, by its label.

        Raises:
            UserError: no stage is called that.
        """
        row = self.row(label)
        if row.name == SOURCE:
            raise UserError(f"{self.folder}: the source is where the recipe's model.source says.")
        return self.folder / row.name


def run_result(folder: Path) -> RunResult:
    """The results in a run's folder.

    Raises:
        UserError: its `metrics.json` cannot be read.
    """
    return RunResult(folder=folder, rows=read_metrics(folder / METRICS).stages)
