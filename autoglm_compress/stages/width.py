"""Narrow the residual stream."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.cutting.bridges import BridgeCut, neuron_activity, neuron_readers
from autoglm_compress.cutting.importance import choose_channels, top
from autoglm_compress.cutting.residual_stream import ResidualStream, energy
from autoglm_compress.cutting.rotation import (
    Rotation,
    gram_memory,
    principal_directions,
    reader_directions,
    reconstruction,
    turning_memory,
)
from autoglm_compress.cutting.surgery import Cut, Rewrite, slice_axes, unchanged
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.forward.costs import seeing_memory
from autoglm_compress.stages.base import Size, Stage, StageContext, require_alike_layers, resolve_size
from autoglm_compress.stages.head_choice import HeadChoice, choose, with_heads
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.width import width_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TURNING = ("readers", "pca")
GAIN = "gain of "


class Width(Stage):
    """Keep the directions or the channels of the residual stream that matter most, the same ones in every layer.

    `readers` and `pca` turn the residual stream to another basis, which needs norms that linears alone read: `readers`
    keeps the directions from which the outputs of all linears that read the stream are best predicted, `pca` the
    principal directions of the normalised states, as SliceGPT (Ashkboos et al. 2024) does per layer. The others keep
    channels as they are: `least_squares` those from which the readers' outputs are best predicted (optimal brain
    surgery, one after the other); `activation` by Minitron's score (Muralidharan et al. 2024), the mean absolute output
    of a channel summed over all norms; `magnitude` by the norm of a channel's column of the embedding. Left out,
    `method` is `readers` where the stream can be turned, else `least_squares`. A norm that now runs over fewer channels
    divides by another root mean square, so each gain is multiplied by the ratio that calibration shows.

    Turning a stream moves the final norm's gain into the head. Where the head is the embedding, the two that this would
    make are tied again as the stage `tie` does.

    `num_attention_heads` cuts query heads too, as the stage `heads` does by contribution: for models that take head_dim
    to be hidden_size / num_attention_heads. What towers beside the text write to the stream is turned or cut with it;
    neurons within them that are as many as the stream's channels are kept by what they contribute where calibration
    rows have images or sounds, or by their weights if none do.
    """

    stage: Literal["width"]
    hidden_size: Size
    num_attention_heads: Size | None = None
    method: Literal["readers", "pca", "least_squares", "activation", "magnitude", "random"] | None = None

    revision: ClassVar[int] = 3

    @property
    def uses_calibration(self) -> bool:
        """Always: norms are rescaled by what calibration shows."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with a narrower residual stream."""
        require_alike_layers(shape, self.stage)
        if shape.family.kept and not shape.family.bridges:
            towers = ", ".join(shape.family.kept)
            raise PlanError(
                "stage",
                f"width would narrow the states, but the kept towers ({towers}) give full width: leave it out, or say "
                "in the family's bridges which of their tensors do",
            )
        keep = resolve_size(self.hidden_size, shape.hidden_size)
        if not 1 <= keep <= shape.hidden_size:
            raise PlanError("hidden_size", f"{keep}: expected 1 to {shape.hidden_size}, the source's hidden_size")
        if keep % 8:
            below = keep // 8 * 8
            raise PlanError("hidden_size", f"{keep}: kernels need a multiple of 8: use {below} or {below + 8}")
        if self.method in TURNING and shape.family.writer_norms:
            message = (
                "cannot rotate this residual stream, as norms follow the linears that write to it: use least_squares"
            )
            raise PlanError("method", f"{self.method} {message}")
        if self.num_attention_heads is not None:
            shape = with_heads(shape, self.num_attention_heads, None)
        return shape.with_width(keep)

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """A few Gram matrices, or what turning takes, and tying again."""
        measured = super().needs(shape, source, calibration)
        kept = resolve_size(self.hidden_size, shape.hidden_size)
        turned = turning_memory(shape, kept) if self._method(shape) in TURNING else 0
        return replace(measured, memory=max(measured.memory, gram_memory(shape), turned))

    def seeing_memory(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> int:
        """The towers see before they are cut."""
        return seeing_memory(source)

    def _method(self, shape: ModelShape) -> str:
        return self.method or ("least_squares" if shape.family.writer_norms else "readers")

    @classmethod
    def plot(cls, record: Record) -> "Figure | None":
        """The factors on the norms' gains."""
        return width_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose what to keep and write a checkpoint without the rest."""
        heads = None if self.num_attention_heads is None else choose(context, "contribution")
        method = self._method(context.source.shape)
        if context.shape.hidden_size == context.source.shape.hidden_size:
            self._write(context, {}, heads)
            context.decisions |= {"method": "nothing to remove"}
        elif method in TURNING:
            self._turn(context, method, heads)
        else:
            self._select(context, method, heads)
        if heads is not None:
            context.lineage = heads.left_of(context.lineage)
            context.decisions["layers"] = heads.as_data()

    def _write(
        self,
        context: StageContext,
        cut: Cut,
        heads: HeadChoice | None,
        change: Callable[[str, torch.Tensor], torch.Tensor] = unchanged,
    ) -> None:
        source = context.source

        def bridge(name: str, tensor: torch.Tensor, axes: tuple[str | int, ...]) -> torch.Tensor:
            return change(name, slice_axes(tensor, axes, cut))

        towers = BridgeCut(source, context.shape.hidden_size, bridge, _tower_activity(context))
        rewrite = Rewrite(
            range(source.shape.num_hidden_layers),
            cut,
            lambda layer: cut | (heads.cut(layer) if heads else {}),
            change,
            make_kept=lambda name: {name: towers.read(name)},
        )
        rewrite.run(source, context.target, context.shape, context.runtime.progress)
        if towers.neurons:
            context.decisions["kept_tower_neurons"] = {module: list(kept) for module, kept in towers.neurons.items()}

    def _turn(self, context: StageContext, method: str, heads: HeadChoice | None) -> None:
        source, keep = context.source, context.shape.hidden_size

        def compute() -> dict[str, torch.Tensor]:
            stream = _stream(context)
            total = stream.sum_of_grams()
            if method == "pca":
                basis = reading = principal_directions(total, keep)
            else:
                basis = reader_directions(total, stream.reader_metric(), keep)
                reading = reconstruction(total, basis)
            found = {"basis": basis, "reading": reading.clone(), "share": energy(basis, total) / total.trace()}
            # Another pass over the statistics, so that one layer's Gram matrix is in memory and not all of them.
            for name, gram in stream.grams():
                gain = float(energy(basis, gram) / basis.shape[1] / gram.diagonal().mean()) ** 0.5
                found[GAIN + name] = torch.tensor(gain, dtype=torch.float64)
            return found

        found = computed_once(context.work / "turn.safetensors", compute)
        basis, gains = found["basis"], {n.removeprefix(GAIN): float(found[n]) for n in found if n.startswith(GAIN)}
        rotation = Rotation(source, basis, found["reading"], gains)
        tied = _stream(context).tied_again(rotation) if source.shape.tie_word_embeddings else {}

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tied[name].to(tensor.dtype) if name in tied else rotation.change(name, tensor)

        self._write(context, {}, heads, change)
        context.lineage = context.lineage.keep_directions(basis, context.origin.shape.hidden_size)
        context.decisions |= {"method": method, "share_of_energy": float(found["share"]), "gains": gains}

    def _select(self, context: StageContext, method: str, heads: HeadChoice | None) -> None:
        keep, stream = context.shape.hidden_size, _stream(context)
        if method == "least_squares":
            kept = choose_channels(stream.sum_of_grams(), stream.reader_metric(), keep)
        else:
            kept = top(stream.channel_scores(method, context.seed), keep)
        gains = {
            name: float((square[list(kept)].mean() / square.mean()).sqrt()) for name, _, square in stream.norm_moments()
        }

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.float() * gains[name]).to(tensor.dtype) if name in gains else tensor

        self._write(context, {"hidden": torch.tensor(kept)}, heads, change)
        context.lineage = context.lineage.keep_channels(kept)
        context.decisions |= {"method": method, "kept_channels": list(kept), "gains": gains}


def _tower_activity(context: StageContext) -> dict[str, torch.Tensor]:
    """What `neuron_activity` finds; without images and sounds it takes no time."""
    if context.shape.hidden_size == context.source.shape.hidden_size or not neuron_readers(context.source):
        return {}
    return computed_once(
        context.work / "tower-activity.safetensors", lambda: neuron_activity(context.source, context.text.batches)
    )


def _stream(context: StageContext) -> ResidualStream:
    return ResidualStream(context.source, context.lineage, context.statistics())
