"""What `plan --json` prints: the shapes, sizes and needs of a recipe's checkpoints, all in bytes."""

from autoglm_compress.records.files import Record
from autoglm_compress.records.stage import Shape


class PlannedStage(Record):
    """The source, or the checkpoint after one stage. A stage that makes no checkpoint repeats the one before it.

    `unique_parameters` counts a shared adapter once. `peak_memory_bytes_estimate` is a rough upper
    estimate, and 0 for the source.
    """

    name: str
    stage: str
    shape: Shape
    parameters: int
    unique_parameters: int
    parameters_by_part: dict[str, int]
    bytes: int
    kv_cache_bytes_per_1000_tokens: int
    peak_memory_bytes_estimate: int
    disk_bytes: int
    warnings: list[str]


class PlanRecord(Record):
    """The source and every stage, the disk that the run needs at most, what it keeps of that, and what is free."""

    checkpoints: list[PlannedStage]
    disk_bytes_needed: int
    disk_bytes_kept: int
    disk_bytes_free: int
    warnings: list[str]
