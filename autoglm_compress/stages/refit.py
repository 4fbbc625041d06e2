"""Repair the damage of earlier surgeries by fitting every linear to the original."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.fitting.bridges import BridgeFits, fit_bridges
from autoglm_compress.fitting.fit_records import fit_record, fitted_linears, has_changed, losses_record
from autoglm_compress.fitting.refit import PairedWalk
from autoglm_compress.fitting.refit_costs import bridges_memory, refit_memory, refit_scratch
from autoglm_compress.stages.base import SharedContext, Stage, StageContext, require_alike_layers
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.refit import refit_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Refit(Stage):
    """Fit all linears, layer by layer, so that the residual stream follows that of the run's source.

    The shape stays. One walk over source and checkpoint together; linears are fitted in closed form. `logit_passes`
    is how often gradient descent then goes over the calibration tokens to bring the next-token distribution nearer to
    the source's, by changing the head alone, or the last layer where the head is tied; before that, `layer_passes` is
    the same for every layer as a whole, towards the source's residual stream. A pass costs three times what it takes to
    send the tokens through the checkpoint: hours for a large model on a CPU, where 0 may be the better choice. A fit
    is kept only where it is better on rows that no stage of the run is fitted to.

    Where the stream is narrower and calibration rows have images or sounds, the linears of towers that the cut has
    changed are fitted first, to what the source's towers make.
    """

    stage: Literal["refit"]
    layer_passes: int = Field(default=2, ge=0, strict=True)
    logit_passes: int = Field(default=3, ge=0, strict=True)

    revision: ClassVar[int] = 6

    @property
    def uses_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def holds_out_samples(self) -> bool:
        """Always."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape."""
        require_alike_layers(shape, self.stage)
        if len(norms := shape.family.norm_readers) != 2:
            raise PlanError(
                "stage",
                f"refit goes from a norm before attention to one before the FFN, and `smoothing` of "
                f"{shape.family.architecture} has {len(norms)} norms: leave this stage out",
            )
        return shape

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """What the largest of its steps holds, and the hidden states of both models."""
        return Needs(
            memory=refit_memory(
                shape, source, calibration, layer_passes=self.layer_passes, logit_passes=self.logit_passes
            ),
            scratch=refit_scratch(shape, source, calibration.tokens),
            fan_in=shape.widest_input,
        )

    def seeing_memory(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> int:
        """Both models' towers see, and the linears by which they write are fitted."""
        return bridges_memory(shape, source, calibration)

    @property
    def runs_in_all_processes(self) -> bool:
        """Each walks a share of the calibration rows."""
        return True

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """Errors of every linear, before and after."""
        return refit_plot(record)

    @classmethod
    def linears(cls, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        """The errors before and after every fit."""
        return list(fitted_linears(decisions))

    def run(self, context: StageContext) -> None:
        """Walk source and checkpoint in pairs and write the refitted layers."""
        source, target, family = context.source, context.target, context.source.family
        layers = source.shape.num_hidden_layers
        rows = context.text.divided()
        bridges = _fit_bridges(context, rows)
        walk = self._walk(context, rows)
        shared = source if context.made_by_the_run else None
        target.write(0, {family.embedding: source.read(family.embedding)}, same_as=shared)
        self._write_layers(context, walk)
        head_changed = self._write_last(context, walk, target, source)
        target.finish(
            source.config,
            like=source,
            make_kept=lambda name: {name: bridges.tensors[name] if name in bridges.tensors else source.read(name)},
        )
        found = [json.loads(_fits_file(context, layer).read_text()) for layer in range(layers)]
        context.decisions["layers"] = [layer["fits"] for layer in found]
        context.decisions["distilled_layers"] = [layer["distilled"] for layer in found]
        context.decisions |= bridges.as_data()
        if not (bridges.tensors or head_changed or any(layer["changed"] for layer in found)):
            context.ends_where_it_began("no fit was better on the rows that decide")

    def follow(self, context: SharedContext) -> None:
        """Do what the first process does, and leave the writing to it."""
        rows = context.text.divided()
        _fit_bridges(context, rows)
        walk = self._walk(context, rows)
        for _, refitted in walk.run():
            del refitted  # so that it is not there beside the next layer
        if not walk.compressed.shape.tie_word_embeddings:
            walk.refit_head()

    def _walk(self, context: SharedContext, rows: DividedRows) -> PairedWalk:
        return PairedWalk(
            context.origin,
            context.source,
            context.lineage,
            rows,
            runtime=context.runtime,
            folder=context.work,
            layer_passes=self.layer_passes,
            logit_passes=self.logit_passes,
        )

    def _write_layers(self, context: StageContext, walk: PairedWalk) -> None:
        """Refit and write the layers; a function, so that nothing of the last one is kept while the head is fitted."""
        source, target, family = context.source, context.target, context.source.family
        for layer, refitted in walk.run():
            prefix = family.layer_prefix(layer)
            changed = has_changed(refitted.fits.values(), refitted.descent)
            found = {"fits": refitted.fits, "distilled": losses_record(refitted.descent), "changed": changed}
            write_json(_fits_file(context, layer), found)
            stored = {name: source.infos[prefix + name].dtype for name in refitted.weights}
            unit = {prefix + name: weight.to(stored[name]).cpu() for name, weight in refitted.weights.items()}
            target.write(1 + layer, unit)
            del refitted, unit  # so that they are not there beside the next layer

    def _write_last(
        self, context: StageContext, walk: PairedWalk, target: CheckpointWriter, source: Checkpoint
    ) -> bool:
        """Write what comes after the layers, and return whether it was changed."""
        family, changed = source.family, False
        unit = {family.final_norm: source.read(family.final_norm)}
        if not source.shape.tie_word_embeddings:
            unit[family.head], found, descent = walk.refit_head()
            record = fit_record(found)
            context.decisions |= {"head": record, "distilled_head": losses_record(descent)}
            changed = has_changed([record], descent)
        target.write(1 + source.shape.num_hidden_layers, unit)
        return changed


def _fit_bridges(context: SharedContext, rows: DividedRows) -> BridgeFits:
    """Fit the bridges, and let the checkpoint see by the better ones from here on."""
    found = fit_bridges(
        context.origin, context.source, context.lineage, rows, context.runtime, context.work / "bridges"
    )
    if found.tensors and context.origin.features is not None:
        context.source.features = context.origin.features.of(context.source, found.tensors)
    return found


def _fits_file(context: StageContext, layer: int) -> Path:
    return context.work / f"fits-{layer:05d}.json"
