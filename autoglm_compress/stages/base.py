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
    """Raise PlanError if a stage, which needs a family whose layers have the same tensors, cannot work on this shape.

    What is left of such a family's model may be alike, but what the stage measures is the run's source.
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
    """Nothing but what was found out, in the `decisions` of `stage.json`."""


@dataclass
class StageContext:
    """All that a stage may know of the run around it.

    `origin` is the run's source, `source` the checkpoint that this stage takes, `text` the calibration sources' text.
    `statistics` (of the run's source), `evaluate` (results of lm-eval tasks on `source`) and `open_checkpoint` (one of
    `other_checkpoints`, by its name and option) are functions because what they give is expensive and not every stage
    asks for it. Tasks that a stage evaluates are to be listed in `Stage.evaluates`, to count in its key.

    `shape` is the planned shape of the result; a stage that decides more of it puts that there. `result` is the folder
    that the result goes into, and `target` writes a checkpoint there. Both are None in all processes but the first, and
    `target` is None for a stage that makes no checkpoint. What a killed process left in `result` is still there. `work`
    is a folder of the stage's own that survives a kill and is removed once the stage is complete. A stage leaves what
    it decided in `decisions`, which goes into its `stage.json`, and in `lineage` which parts of the source are left.
    """

    origin: Checkpoint
    source_folder: Path
    target: CheckpointWriter | None
    result: Path | None
    shape: ModelShape
    lineage: Lineage
    text: CalibrationText
    statistics: Callable[[], Statistics]
    evaluate: Callable[[Sequence[str]], dict[str, Any]]
    open_checkpoint: Callable[[str, str], Checkpoint]
    runtime: Runtime
    seed: int
    work: Path
    decisions: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def source(self) -> Checkpoint:
        """The checkpoint that this stage takes, opened when it is first asked for: its weights may be gone by then."""
        return Checkpoint(self.source_folder, self.origin.family)

    def require_source_unchanged(self) -> None:
        """Raise UserError if a weight file of `source` was replaced since it was opened."""
        if "source" in self.__dict__:
            self.source.require_unchanged()

    @property
    def made_by_the_run(self) -> bool:
        """Whether an earlier stage wrote what this one reads, so that files can be shared."""
        return self.source_folder != self.origin.folder


class Stage(BaseModel):
    """The options of a stage as a recipe gives them, and what the stage does."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    stage: str
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    source: str | None = Field(default=None, alias="from")

    revision: ClassVar[int] = 1
    """Raised when the stage's result changes for the same options, so that old results are not taken for new."""
    makes: ClassVar[Makes] = Makes.CHECKPOINT
    """What the stage leaves in its folder beside `stage.json`."""
    makes_quantized: ClassVar[bool] = False
    """Whether the checkpoint it writes is quantized."""
    reads_quantized: ClassVar[bool] = False
    """Whether the stage can take a quantized checkpoint."""

    compares_held_out: ClassVar[bool] = False
    """Whether the stage asks for `text.held_out()`, as all do that make a quantized checkpoint."""

    accepting: ClassVar[frozenset[str]] = frozenset()
    """Options that do not change the result but say which one is good enough."""
    tokens_per_input: ClassVar[int] = 2
    """Calibration tokens for each input of its largest linear, of which fewer do harm."""
    holds_out_samples: ClassVar[bool] = False
    """Whether some calibration samples decide about what was fitted to the others."""

    @property
    def label(self) -> str:
        """The name that other stages and the command line know this stage by."""
        return self.name or self.stage

    @property
    def uses_calibration(self) -> bool:
        """Whether the result depends on the calibration text, directly or through the statistics."""
        return False

    @property
    def evaluates(self) -> tuple[str, ...]:
        """The tasks whose results the stage asks for with `context.evaluate`; if it has any, it needs nothing else.

        So its checkpoint's weights need not be there where these results are known.
        """
        return ()

    @property
    def runs_in_all_processes(self) -> bool:
        """Whether all processes of a run work on it together, where there are several, or the first alone.

        The others have no `target`. What asks for the `statistics` alone need not say so: all measure them anyway. A
        stage that runs in all processes cannot ask for them.
        """
        return False

    @property
    def trains_on_calibration(self) -> bool:
        """Whether the stage asks for `text.training`, more of the calibration sources than the samples."""
        return False

    @property
    def other_checkpoints(self) -> Mapping[str, str]:
        """Folders or hub ids, beside source and parent, that the result depends on, by the option that names them."""
        return {}

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape after this stage.

        Raises:
            PlanError: the stage cannot work on this shape.
        """
        raise NotImplementedError

    def check_calibration(self, calibration: CalibrationOptions) -> None:
        """Raise PlanError if the stage cannot work with so much calibration text."""

    def check_other(self, shape: ModelShape, other: ModelShape) -> None:
        """Raise PlanError if the stage cannot use one of `other_checkpoints` with the shape it is given."""

    def check_source(self, folder: Path, family: Family | None) -> None:
        """Raise UserError if what stands beside the weights of the run's source, in `folder`, is none for the stage.

        That is the config, and the tokenizer if it is there yet. `family` is the one that the recipe gives.
        """

    def needs(self, shape: ModelShape, source: ModelShape, tokens: int) -> Needs:
        """What the stage costs on a shape, with so many calibration tokens; `source` is the run's source."""
        return Needs()

    @classmethod
    def plot(cls, record: Record) -> "Figure | None":
        """A figure of what the stage decided, or None if there is nothing to show.

        Args:
            record: the content of `stage.json`, which another version of the stage may have written.
        """
        return None

    @classmethod
    def linears(cls, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        """What was found out about single linears, for the tables and heat maps of a report.

        Each entry has `layer` (None outside the layers), `part` (the linear's name) and measures: numbers, text or
        None by their names. Empty if the stage does not work linear by linear.

        Args:
            decisions: what `run` left in the context.
        """
        return []

    def check_processes(self, processes: Processes) -> None:
        """Raise UserError if the stage cannot be run by so many processes together."""

    def warnings(self, shape: ModelShape) -> list[str]:
        """What the user should know before running this stage on a shape it can work on."""
        return []

    def accept(self, decisions: dict[str, Any], source: Path) -> None:
        """See whether a result is good enough, by the decisions and the folder of the checkpoint it was made from.

        Asked again of a finished stage, whose `accepting` options may be others by now.

        Raises:
            UserError: it is not.
        """

    def run(self, context: StageContext) -> None:
        """Read `context.source`, write `context.target`."""
        raise NotImplementedError
