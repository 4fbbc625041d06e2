"""`metrics.json`: a row for the source and for each finished stage."""

from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from autoglm_compress.records.files import RUN_AGAIN, Record, read_record, validated
from autoglm_compress.records.stage import Shape
from autoglm_compress.records.task_results import MmluSummary


class Row(Record):
    """The source, or a stage: its checkpoint, what it cost in seconds and bytes, and what was measured of it.

    Deltas are against the source and against the checkpoint that the stage took. A shared adapter counts once
    in `unique_parameters`.
    """

    name: str
    stage: str
    shape: Shape = Shape()
    parameters: int | None = None
    unique_parameters: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    processes: int | None = None
    perplexity: float | None = None
    perplexity_delta_source: float | None = None
    perplexity_delta_previous: float | None = None
    accuracy: float | None = None
    accuracy_delta_source: float | None = None
    accuracy_delta_previous: float | None = None
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name without its number."""
        number, _, label = self.name.partition("-")
        return label if number.isdigit() and label else self.name

    @cached_property
    def mmlu(self) -> MmluSummary | None:
        """The result of the task `mmlu`, if the checkpoint was asked; its questions are in `evaluations/`."""
        result = self.evaluations.get("mmlu")
        return None if result is None else MmluSummary.model_validate(result)


class Metrics(Record):
    """`metrics.json`."""

    recipe: str
    stages: list[Row] = Field(min_length=1)


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.json`.

    Raises:
        UserError: the file cannot be read, is not JSON or not as the schema has it, or a result of MMLU in it is not.
    """
    metrics = read_record(Metrics, path)
    for number, row in enumerate(metrics.stages):
        if "mmlu" in row.evaluations:
            validated(MmluSummary, row.evaluations["mmlu"], path, RUN_AGAIN, f"stages.{number}.evaluations.mmlu.")
    return metrics
