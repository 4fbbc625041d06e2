"""One matrix for embedding and head."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.reconstruction.surgery import Rewrite
from autoglm_compress.reconstruction.tying import OUTPUT_WEIGHT, pair_moments, tie_least_squares
from autoglm_compress.stages.base import PlanError, Stage, StageContext

ERRORS = ("input_error", "output_error")


class Tie(Stage):
    """Replace the embedding and the head by one matrix, which the checkpoint then holds once.

    `least_squares` finds the matrix, and the final norm's gain, that serve both best. `output_weight` is how much the
    logits count against the embedding: much, since a refit after this stage can make up for a wrong embedding, which
    all layers see, but not for a wrong head. `average` takes the mean of the two, `input` the embedding, `output` the
    head.
    """

    stage: Literal["tie"]
    method: Literal["least_squares", "average", "input", "output"] = "least_squares"
    output_weight: float = Field(default=OUTPUT_WEIGHT, gt=0)

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.method == "least_squares"

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape without a head of its own."""
        if shape.tie_word_embeddings:
            raise PlanError("stage", "the embeddings are tied already: leave this stage out")
        return replace(shape, tie_word_embeddings=True)

    def warnings(self, shape: ModelShape) -> list[str]:
        """Tying costs accuracy that other savings of the same size do not."""
        saved = shape.vocab_size * shape.hidden_size * shape.element_bytes
        return [
            f"tying saves {saved / 1e6:,.0f} MB and is the stage that costs most accuracy; "
            "an untied pair stored in INT8 takes the same bytes"
        ]

    def working_memory(self, shape: ModelShape) -> int:
        """Both matrices and the new one as they are stored, and a few Gram matrices in fp64."""
        return 3 * shape.vocab_size * shape.hidden_size * shape.element_bytes + 12 * 8 * shape.hidden_size**2

    def scratch_bytes(self, shape: ModelShape, source: ModelShape, tokens: int) -> int:
        """The shared matrix, or two buffers of the walk that measures the statistics."""
        return max(shape.element_bytes * shape.vocab_size * shape.hidden_size, 2 * 4 * tokens * source.hidden_size)

    def run(self, context: StageContext) -> None:
        """Write a checkpoint with the shared matrix."""
        changed = self._changed(context)

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return changed[name].to(tensor.dtype) if name in changed else tensor

        layers = range(context.source.shape.num_hidden_layers)
        rewrite = Rewrite(layers, {}, lambda _: {}, change, linked=context.made_by_the_run)
        rewrite.run(context.source, context.target, context.shape, context.progress)

    def _changed(self, context: StageContext) -> dict[str, torch.Tensor]:
        """The tensors that tying changes, by name."""
        source, family = context.source, context.source.family
        if self.method == "least_squares":
            found = computed_once(context.work / "tied.safetensors", lambda: self._fitted(context))
            context.decisions = {error: float(found.pop(error)) for error in ERRORS}
            return found
        embedding, head = source.read(family.embedding), source.read(family.head)
        if self.method == "average":
            return {family.embedding: torch.lerp(embedding, head, 0.5)}
        return {family.embedding: embedding if self.method == "input" else head}

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
