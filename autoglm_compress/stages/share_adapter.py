"""One projection for the features of images and sounds."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.architecture.family_files import known_families
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.fitting.adapter_choice import AdapterChoice, adapter_memory, adapter_scratch
from autoglm_compress.stages.base import Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.share_adapter import share_adapter_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ShareAdapter(Stage):
    """Replace the last linears of the vision and the audio tower by one, written in both places with equal values.

    Least squares over the features of images and sounds, each kind with the same weight, finds the one projection.
    `passes` is how often gradient descent then goes over the calibration rows to fit the modules before it to the
    features that the towers gave before. What is trained is kept if predictions on rows that decide are nearer to those
    before. Plain transformers cannot store the projection once: `config.json` and `stage.json` say that it is shared,
    later stages keep the two equal, and tables count it once in a column of its own.
    """

    stage: Literal["share_adapter"]
    passes: int = Field(default=3, ge=0, strict=True)

    compares_held_out: ClassVar[bool] = True
    reads_media: ClassVar[tuple[str, ...]] = ("image", "audio")

    @property
    def uses_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def holds_out_samples(self) -> bool:
        """Always."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape, whose adapter is shared."""
        kinds = shape.family.projections
        if not kinds:
            both = ", ".join(sorted(family.architecture for family in known_families().values() if family.projections))
            architecture = shape.family.architecture
            raise PlanError("stage", f"{architecture} does not both see and hear, as {both} does: leave this stage out")
        if shape.shared_adapter:
            raise PlanError("stage", "the adapter is shared already: leave this stage out")
        tensors = {kind: shape.projection(kind) for kind in kinds}
        if len({frozenset(found.items()) for found in tensors.values()}) > 1:
            found = ", ".join(f"{kinds[kind].linear} {_written(each)}" for kind, each in tensors.items())
            raise PlanError("stage", f"one projection cannot replace linears of unequal sizes, {found}: leave it out")
        return replace(shape, shared_adapter=True)

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """The towers while they are trained, and sums over features; on disk, what goes into the projections."""
        return Needs(
            memory=adapter_memory(shape, calibration.batch_tokens),
            scratch=adapter_scratch(shape, calibration.tokens),
            fan_in=max(shape.projection(kind)["weight"][1] for kind in shape.family.projections),
        )

    @classmethod
    def plot(cls, record: Record) -> "Figure | None":
        """The errors of features, by what they are of."""
        return share_adapter_plot(record)

    def run(self, context: StageContext) -> None:
        """Fit the one projection and write it in both places."""
        source = context.source
        adapters = AdapterChoice(source, context.text.divided(), context.work, context.runtime.alone())
        found = adapters.choose(self.passes)
        held_out = adapters.on_held_out(found.changed, context.text.held_out())
        saved = context.shape.parameters - context.shape.unique_parameters
        context.decisions |= found.record | {"held_out_divergence": held_out, "parameters_saved": saved}
        if found.warning:
            context.warnings.append(found.warning)

        def kept(name: str) -> dict[str, torch.Tensor]:
            return {name: found.changed[name] if name in found.changed else source.read(name)}

        layers = range(source.shape.num_hidden_layers)
        rewrite = Rewrite(layers, {}, lambda _: {}, linked=context.made_by_the_run, make_kept=kept)
        rewrite.run(source, context.target, context.shape, context.runtime.progress)


def _written(tensors: dict[str, tuple[int, ...]]) -> str:
    """The sizes of a linear's tensors, as text."""
    return " and ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in sorted(tensors.items()))
