"""Quantize the decoder layers' linears to 4 or 8 bits."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from autoglm_compress.architecture import ModelShape, Quantization
from autoglm_compress.architecture.sizes_in_config import with_sharing
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint.quantized_format import FORMATS
from autoglm_compress.figures import Record
from autoglm_compress.quantization.autoawq_backend import write_with_autoawq
from autoglm_compress.quantization.bit_choice import choose_bits, planned, with_rounded_towers
from autoglm_compress.quantization.checks import check_options, loader_warnings
from autoglm_compress.quantization.costs import fed_back_fan_in, quantizing_memory, quantizing_scratch
from autoglm_compress.quantization.linear_records import rounded_linears
from autoglm_compress.quantization.nearest import round_layers
from autoglm_compress.quantization.options import QuantizationOptions
from autoglm_compress.quantization.quantizing_walk import walk_and_quantize
from autoglm_compress.quantization.result_check import measure_agreement, require_agreement
from autoglm_compress.quantization.writing import LayerWriter, tower_tensor, write_outside
from autoglm_compress.stages.base import SharedContext, Stage, StageContext
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.quantize import quantize_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Quantize(Stage, QuantizationOptions):
    """Round the decoder layers' linears to integers with a scale per group of input features.

    `awq` (Lin et al. 2023) scales channels before rounding, so that important channels are rounded finely. With
    `error_feedback` (GPTQ, Frantar et al. 2023), later inputs correct the error of rounding earlier ones;
    `round_to_nearest` does not look at activations. `bits: auto` gives 8 bits to the linears that lose most with 4
    bits, as far as the `budget` allows. Embedding, norms and biases keep their dtype, and so does the head unless
    `head_bits` is 8. The result is compressed-tensors `pack-quantized`, or AutoAWQ's GEMM layout with `format: awq`.
    Before it counts as done, its predictions on held-out text are compared with those before: a mean KL divergence over
    `max_divergence` nats, or predictions that are not finite, fail the stage.

    `towers: {vision: {bits: 8}}` rounds the linears of a tower beside the text to the nearest of 8 bits; without it
    towers keep their dtype.

    `backend: autoawq` quantizes with AutoAWQ 0.2.9 instead, with its own search and the whole model in memory, for
    comparison.
    """

    stage: Literal["quantize"]

    makes_quantized = True
    accepting = frozenset({"max_divergence"})
    tokens_per_input = 1
    revision: ClassVar[int] = 4

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.looks_at_activations

    @property
    def runs_in_all_processes(self) -> bool:
        """Whether there are calibration rows to share."""
        return self.method == "awq" and self.backend == "own"

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with quantized linears; with `bits: auto` the first of them have 8 bits until the run decides."""
        check_options(self, shape)
        shape = with_rounded_towers(self, shape)
        return replace(shape, quantization=planned(self, shape))

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """What the largest of its steps holds, and the states that are walked."""
        return Needs(
            memory=quantizing_memory(self, shape, calibration),
            scratch=quantizing_scratch(self, shape, calibration.tokens),
            fan_in=fed_back_fan_in(self, shape),
        )

    def warnings(self, shape: ModelShape) -> list[str]:
        """What some loaders do not take, and an adapter that is shared no longer."""
        found = loader_warnings(self)
        if shape.shared_adapter and not with_rounded_towers(self, shape).shared_adapter:
            found.append(
                "the shared adapter is rounded in one of its places alone, or to other bits, and is two from here on: "
                f"give the towers {', '.join(shape.adapter_towers)} the same bits, or none"
            )
        return found

    @classmethod
    def plot(cls, record: Record) -> "Figure | None":
        """Rounding errors by layer."""
        return quantize_plot(record)

    @classmethod
    def linears(cls, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        """Rounding errors, and with `bits: auto` the bits."""
        return rounded_linears(decisions)

    def run(self, context: StageContext) -> None:
        """Quantize layer by layer, each on inputs from the quantized layers before it, write and check the result."""
        source, target = context.source, context.target
        quantization = self._choose_bits(context) if self.bits == "auto" else planned(self, source.shape)
        writer = LayerWriter(source, target, quantization, context.work)
        write_outside(source, target, quantization)
        if self.backend == "autoawq":
            write_with_autoawq(source, target, lambda: context.text.batches, self.group_size)
        else:
            self._quantize_layers(context, writer)
        described = FORMATS[self.format].quantization_config(quantization, source.family)
        target.finish(
            with_sharing(source.config, context.shape.shared_adapter) | {"quantization_config": described},
            like=source,
            make_kept=lambda name: tower_tensor(source, quantization, name),
        )
        self._check(context)

    def follow(self, context: SharedContext) -> None:
        """Share in the walk."""
        self._walk(context, None)

    def _choose_bits(self, context: StageContext) -> Quantization:
        """Replace the planned shape's bits by those that cost least within the budget, and return them."""
        batches, file = context.text.batches, context.work / "sensitivity.json"
        choice = choose_bits(self, context.source, batches, context.runtime, file)
        context.shape = replace(context.shape, quantization=choice.quantization)
        context.decisions |= {"average_bits": choice.average_bits, "bits": choice.groups}
        return choice.quantization

    def _quantize_layers(self, context: StageContext, writer: LayerWriter) -> None:
        if self.method == "awq":
            self._walk(context, writer)
        else:
            round_layers(writer, context.runtime)
        layers = range(context.source.shape.num_hidden_layers)
        context.decisions["layers"] = [writer.decisions(layer) for layer in layers]

    def _walk(self, context: SharedContext, writer: LayerWriter | None) -> None:
        """What all processes do together."""
        walk_and_quantize(
            context.source,
            lambda: context.text.batches,
            writer=writer,
            folder=context.work,
            error_feedback=self.error_feedback,
            runtime=context.runtime,
        )

    def _check(self, context: StageContext) -> None:
        """Fail if the written checkpoint does not predict what the one before it does."""
        rows, made = context.text.held_out(), context.target.folder
        context.decisions["agreement"] = measure_agreement(context.source, made, rows, context.runtime)
        self.accept(context.decisions, context.source.folder)

    def accept(self, decisions: dict[str, Any], source: Path) -> None:
        """See whether the predictions are near enough to those before."""
        require_agreement(decisions["agreement"], self.max_divergence, self.label, source)
