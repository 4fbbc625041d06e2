"""One matrix for embedding and head."""

from dataclasses import replace
from typing import Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.reconstruction.surgery import Rewrite
from autoglm_compress.stages.base import PlanError, Stage, StageContext


class Tie(Stage):
    """Replace the embedding and the head by one matrix, which the checkpoint then holds once.

    `average` takes their mean, `input` the embedding, `output` the head.
    """

    stage: Literal["tie"]
    method: Literal["average", "input", "output"] = "average"

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

    def run(self, context: StageContext) -> None:
        """Write a checkpoint with the shared matrix."""
        source, family = context.source, context.source.family

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name != family.embedding or self.method == "input":
                return tensor
            head = source.read(family.head)
            return head if self.method == "output" else ((tensor.float() + head.float()) / 2).to(tensor.dtype)

        Rewrite(range(source.shape.num_hidden_layers), {}, lambda _: {}, change).run(
            source, context.target, context.shape, context.progress
        )
