"""One matrix for embedding and head."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.cutting.tying import OUTPUT_WEIGHT, pair_moments, tie_least_squares, tying_memory
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.fitting.descent import Descent
from autoglm_compress.fitting.tied_ends import TiedEnds, ends_memory, ends_scratch, record
from autoglm_compress.forward.hidden_states import buffer_bytes
from autoglm_compress.stages.base import Stage, StageContext, require_alike_layers
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.tie import tie_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERRORS = ("input_error", "output_error")


class Tie(Stage):
    """Replace the embedding and the head by one matrix, which the checkpoint then holds once.

    `least_squares` finds the matrix, and the final norm's gain, that serve both best. `output_weight` is how much the
    logits count against the embedding: a refit or healing after this stage repairs wrong logits in the last layers. It
    hardly repairs a wrong embedding, because all layers see it. `average` takes the mean of the two, `input` the
    embedding, `output` the head. With `passes` over the calibration text, the matrix and the layers at both ends are
    then trained to replace the untied ends, so that the layers between them see familiar states. This works best if the
    checkpoint was refitted before.
    """

    stage: Literal["tie"]
    method: Literal["least_squares", "average", "input", "output"] = "least_squares"
    output_weight: float = Field(default=OUTPUT_WEIGHT, gt=0, allow_inf_nan=False)
    passes: int = Field(default=0, ge=0, strict=True)

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations, or layers are trained on them."""
        return self.method == "least_squares" or self.passes > 0

    @property
    def holds_out_samples(self) -> bool:
        """Whether some samples decide about what is trained."""
        return self.passes > 0

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape without a head of its own."""
        if shape.tie_word_embeddings:
            raise PlanError("stage", "the embeddings are tied already: leave this stage out")
        if not shape.family.transformers_ties:
            architecture = shape.family.architecture
            raise PlanError("stage", f"transformers gives {architecture} a head of its own: leave this stage out")
        if self.uses_calibration:
            require_alike_layers(shape, f"{self.stage} with {self.method}")
        if self.passes and shape.num_hidden_layers < 2:
            raise PlanError("passes", "trains layers at both ends, and there is one layer: leave it out")
        return replace(shape, tie_word_embeddings=True)

    def warnings(self, shape: ModelShape) -> list[str]:
        """Tying costs accuracy that other savings of the same size do not."""
        saved = shape.vocab_size * shape.hidden_size * shape.element_bytes
        return [
            f"tying saves {saved / 1e6:,.0f} MB and is the stage that costs most accuracy; "
            "an untied pair stored in INT8 takes the same bytes"
        ]

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """What finding the shared matrix takes, or fitting the ends to it if that is more."""
        matrix, tokens = shape.vocab_size * shape.hidden_size * shape.element_bytes, calibration.tokens
        memory, scratch = 3 * matrix, max(matrix, buffer_bytes(source, tokens))
        if self.method == "least_squares":
            memory = max(tying_memory(shape), super().needs(shape, source, calibration).memory)
        if self.passes:
            memory = max(memory, ends_memory(shape, tokens, calibration.batch_tokens))
            scratch = max(scratch, ends_scratch(shape, tokens))
        return Needs(memory=memory, scratch=scratch)

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """How far the one matrix is from both that it stands for."""
        return tie_plot(record)

    def run(self, context: StageContext) -> None:
        """Write a checkpoint with the shared matrix."""
        changed = self._changed(context)
        if self.passes:
            changed = self._with_fitted_ends(context, changed)

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return changed[name].to(tensor.dtype) if name in changed else tensor

        layers = range(context.source.shape.num_hidden_layers)
        rewrite = Rewrite(layers, {}, lambda _: {}, change, linked=context.made_by_the_run)
        rewrite.run(context.source, context.target, context.shape, context.runtime.progress)

    def _changed(self, context: StageContext) -> dict[str, torch.Tensor]:
        """The tensors that tying changes, by name."""
        source, family = context.source, context.source.family
        if self.method == "least_squares":
            found = computed_once(context.work / "tied.safetensors", lambda: self._fitted(context))
            context.decisions |= {error: float(found.pop(error)) for error in ERRORS}
            return found
        embedding, head = source.read(family.embedding), source.read(family.head)
        if self.method == "average":
            return {family.embedding: torch.lerp(embedding, head, 0.5)}
        return {family.embedding: embedding if self.method == "input" else head}

    def _with_fitted_ends(self, context: StageContext, changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that tying changes once the ends are trained, if that is better."""
        source, family = context.source, context.source.family

        def fitted() -> dict[str, torch.Tensor]:
            batches = record(source, context.text.divided(), context.work / "states", context.runtime)
            gain = changed.get(family.final_norm, source.read(family.final_norm))
            ends = TiedEnds(source, changed[family.embedding], gain, context.runtime.device)
            descent = ends.fit(batches, self.passes, context.runtime.progress)
            losses = {name: torch.tensor(getattr(descent, name), dtype=torch.float64) for name in ("before", "after")}
            return losses | {name: tensor.to("cpu", source.dtype_of(name)) for name, tensor in ends.tensors()}

        found = computed_once(context.work / "ends.safetensors", fitted)
        descent = Descent(*(float(found.pop(name)) for name in ("before", "after")))
        context.decisions |= {"loss_before": descent.before, "loss_after": descent.after}
        if not descent.improved:
            context.warnings.append(
                "training made the ends no better on rows that decide: they stay as tying made them"
            )
        return found if descent.improved else changed

    def _fitted(self, context: StageContext) -> dict[str, torch.Tensor]:
        """The tensors that least squares changes, and its errors."""
        source, family = context.source, context.source.family
        embedding, head = source.read(family.embedding), source.read(family.head)
        gram = context.lineage.project_gram(context.statistics().final()["residual_gram"])
        moments = pair_moments(embedding, head)
        gain = source.read(family.final_norm)
        tied = tie_least_squares(moments, gain, gram / gram.diagonal().mean(), self.output_weight)
        errors = {error: torch.tensor(getattr(tied, error), dtype=torch.float64) for error in ERRORS}
        return errors | {family.embedding: tied.matrix(embedding, head, moments), family.final_norm: tied.gain}
