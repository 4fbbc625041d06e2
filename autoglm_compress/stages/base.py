"""What a stage is: options, `plan` on shapes, and `run` from one checkpoint to the next."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from autoglm_compress.architecture import Family, ModelShape
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.forward.costs import measuring_memory, seeing_memory
from autoglm_compress.forward.features import with_features_of
from autoglm_compress.forward.statistics import Statistics
from autoglm_compress.processes import Processes
from autoglm_compress.runtime import Runtime
from autoglm_compress.stages.needs import Needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO = re.compile(r"(0?\.\d+|1(\.0+)?)x")


def _size(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and RATIO.fullmatch(value) and float(value[:-1]) > 0:
        return value
    raise ValueError("expected a positive whole number, or a ratio up to 1 such as 0.75x")


Size = Annotated[int | str, PlainValidator(_size)]
"""A size as a number, or as a ratio of what it was, such as `0.75x`."""


def resolve_size(size: int | str, current: int) -> int:
    """A size in absolute numbers."""
    return size if isinstance(size, int) else round(float(size.removesuffix("x")) * current)


def require_alike_layers(shape: ModelShape, stage: str) -> None:
    """Raise PlanError if the family's layers differ in their tensors. Some stages need layers that are alike.

    Even if the remaining layers are alike, the stage's statistics are those of the run's source.
    """
    if shape.family.layer_kinds is not None:
        kinds = ", ".join(sorted(set(shape.layer_kinds)))
        raise PlanError(
            "stage",
            f"the layers of {shape.family.architecture} differ in their tensors ({kinds}), and {stage} works on layers "
            "that are alike: leave this stage out",
        )


class Makes(str, Enum):
    """The kinds of results. All have a key, a folder that appears whole or not at all, and a `stage.json`."""

    CHECKPOINT = "checkpoint"
    """A model that `transformers` loads, which other stages can take."""
    ARTIFACT = "artifact"
    """Files made from a checkpoint that no other stage takes."""
    MEASUREMENT = "measurement"
    """Only measurements, in the `decisions` of `stage.json`."""


@dataclass(kw_only=True)
class SharedContext:
    """What a stage may know about its run, in every process.

    `origin` is the run's source, `source` the checkpoint that this stage takes, `text` the calibration sources' text,
    and `lineage` says which parts of the run's source are left. `open_checkpoint` opens one of `other_checkpoints`, by
    its name and option. `shape` is the planned shape of the result. `work` is a folder of the stage's own that survives
    a kill and is removed once the stage is complete.
    """

    origin: Checkpoint
    source_folder: Path
    shape: ModelShape
    lineage: Lineage
    text: CalibrationText
    open_checkpoint: Callable[[str, str], Checkpoint]
    runtime: Runtime
    seed: int
    work: Path

    @cached_property
    def source(self) -> Checkpoint:
        """The checkpoint that this stage takes, opened at first use, because its weights may be deleted when they are
        not needed.
        """
        return with_features_of(Checkpoint(self.source_folder, self.origin.family), self.origin)

    def require_source_unchanged(self) -> None:
        """Raise UserError if a weight file of `source` was replaced since it was opened."""
        if "source" in self.__dict__:
            self.source.require_unchanged()

    @property
    def made_by_the_run(self) -> bool:
        """Whether an earlier stage wrote this stage's source, so that files can be shared."""
        return self.source_folder != self.origin.folder


@dataclass(kw_only=True)
class StageContext(SharedContext):
    """What a stage may know and has to write, in the first process.

    `statistics` (of the run's source) and `evaluate` (results of lm-eval tasks on `source`) are functions because their
    results are expensive and not every stage needs them. A stage must list the tasks that it evaluates in
    `Stage.evaluates`, so that they count in its key.

    `result` is the folder of the result, and `target` writes a checkpoint there. Files of a killed process in `result`
    are still there. A stage that decides the rest of the result's shape replaces `shape`. It puts its decisions into
    `decisions`, which go into its `stage.json`, and the remaining parts of the source into `lineage`. It puts facts
    about the result that the user should know into `warnings`, which are printed when the stage is complete and also go
    into `stage.json`.
    """

    result: Path
    statistics: Callable[[], Statistics]
    evaluate: Callable[[Sequence[str]], dict[str, Any]]
    decisions: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def target(self) -> CheckpointWriter:
        """Writes a checkpoint into `result`, for a stage that makes one."""
        return CheckpointWriter(self.result, units=self.shape.num_hidden_layers + 2)

    def ends_where_it_began(self, reason: str) -> None:
        """Record and warn that the result has the same weights as the stage's input, and why."""
        self.decisions["unchanged"] = reason
        self.warnings.append(f"the weights are what they were before this stage: {reason}")


class Stage(BaseModel):
    """The options of a stage as a recipe gives them, and what the stage does."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    stage: str
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    source: str | None = Field(default=None, alias="from")

    revision: ClassVar[int] = 1
    """Raise it when the stage's result changes for the same options, so that old results are not reused."""
    makes: ClassVar[Makes] = Makes.CHECKPOINT
    """The kind of result in the stage's folder."""
    makes_quantized: ClassVar[bool] = False
    """Whether the checkpoint it writes is quantized."""
    reads_quantized: ClassVar[bool] = False
    """Whether the stage can take a quantized checkpoint."""

    compares_held_out: ClassVar[bool] = False
    """Whether the stage asks for `text.held_out()`, as all do that make a quantized checkpoint."""

    sidecar: ClassVar[str | None] = None
    """A file that the stage writes beside its checkpoint and that other weights would need anew."""

    reads_media: ClassVar[tuple[str, ...]] = ()
    """The types of parts (image, audio) that the calibration rows must have."""

    accepting: ClassVar[frozenset[str]] = frozenset()
    """Options that do not change the result, but set limits for accepting it."""
    tokens_per_input: ClassVar[int] = 2
    """Calibration tokens needed per input of the largest linear. Fewer do harm."""

    @property
    def label(self) -> str:
        """The stage's name for other stages and for the command line."""
        return self.name or self.stage

    @property
    def uses_calibration(self) -> bool:
        """Whether the result depends on the calibration text, directly or through the statistics."""
        return False

    @property
    def holds_out_samples(self) -> bool:
        """Whether some calibration samples decide about what was fitted to the others."""
        return False

    @property
    def evaluates(self) -> tuple[str, ...]:
        """The tasks that the stage evaluates with `context.evaluate`. A stage with such tasks needs nothing else.

        If their results are known, the weights of its checkpoint may be deleted.
        """
        return ()

    @property
    def runs_in_all_processes(self) -> bool:
        """Whether all processes of a run work on it together, where there are several, or the first alone.

        The others call `follow`. A stage that only needs the `statistics` returns False, because all processes measure
        them anyway. A stage that runs in all processes cannot ask for them.
        """
        return False

    @property
    def trains_on_calibration(self) -> bool:
        """Whether the stage asks for `text.training`, more of the calibration sources than the samples."""
        return False

    @property
    def other_checkpoints(self) -> Mapping[str, str]:
        """Folders or hub ids, other than source and parent, that the result depends on, by the option that names
        them.
        """
        return {}

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape after this stage.

        Raises:
            PlanError: the stage cannot work on this shape.
        """
        raise NotImplementedError

    def check_calibration(self, calibration: CalibrationOptions) -> None:
        """Raise PlanError if the stage cannot work with so much calibration text."""
        if self.holds_out_samples and calibration.samples < 2:
            raise PlanError(
                "stage", "the one sample decides about fits, which leaves none to fit to: raise calibration.samples"
            )

    def check_other(self, shape: ModelShape, other: ModelShape) -> None:
        """Raise PlanError if the stage cannot use one of `other_checkpoints` with the shape it is given."""

    def check_source(self, folder: Path, family: Family | None) -> None:
        """Raise UserError if the stage cannot use the config or the tokenizer of the run's source.

        `folder` is the source's; the tokenizer may not be there yet. `family` is the one that the recipe gives.
        """

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """What the stage costs on a shape, with such calibration; `source` is the run's source.

        A stage that says nothing else is taken to read the statistics, if its result depends on calibration.
        """
        return Needs(memory=measuring_memory(source, calibration.batch_tokens) if self.uses_calibration else 0)

    def seeing_memory(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> int:
        """Bytes that the stage holds while towers make features of images and sounds, where calibration rows have any.

        `shape` is that of the result, `source` the run's source.
        """
        return seeing_memory(shape)

    @classmethod
    def plot(cls, record: Record) -> "Figure | None":
        """A figure of what the stage decided, or None if there is nothing to show.

        Args:
            record: the content of `stage.json`, which another version of the stage may have written.
        """
        return None

    @classmethod
    def linears(cls, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        """Measures of single linears, for the tables and heat maps of a report.

        Each entry has `layer` (None outside the layers), `part` (the linear's name) and measures: numbers, text or
        None by their names. Empty if the stage does not work linear by linear.

        Args:
            decisions: the decisions that `run` left in the context.
        """
        return []

    def check_processes(self, processes: Processes) -> None:
        """Raise UserError if the stage cannot be run by so many processes together."""

    def warnings(self, shape: ModelShape) -> list[str]:
        """Warnings to the user before the stage runs on a shape."""
        return []

    def accept(self, decisions: dict[str, Any], source: Path) -> None:
        """Check whether a result is good enough, by its decisions and the folder of its parent checkpoint.

        Also called for a finished stage, because its `accepting` options may have changed.

        Raises:
            UserError: the result is not good enough.
        """

    def run(self, context: StageContext) -> None:
        """Read `context.source`, write `context.target`, in the first process."""
        raise NotImplementedError

    def follow(self, context: SharedContext) -> None:
        """Take part in `run` in another process, which writes nothing, if the stage `runs_in_all_processes`."""
        raise NotImplementedError
