"""Drop whole decoder layers."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from autoglm_compress.architecture import ModelShape
from autoglm_compress.reconstruction.importance import random_scores, top
from autoglm_compress.reconstruction.lineage import Indices
from autoglm_compress.reconstruction.surgery import Rewrite
from autoglm_compress.stages.base import PlanError, Size, Stage, StageContext, resolve_size


class Depth(Stage):
    """Keep the layers that change the residual stream most, or those that are listed.

    `block_influence` is ShortGPT's score (Men et al. 2024): 1 - mean cosine of a layer's input and output.
    """

    stage: Literal["depth"]
    num_hidden_layers: Size | None = None
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    method: Literal["block_influence", "random"] = "block_influence"

    @model_validator(mode="after")
    def _one_of_two(self) -> "Depth":
        if (self.num_hidden_layers is None) == (self.layers is None):
            raise ValueError("give either num_hidden_layers (how many to keep) or layers (which ones to keep)")
        return self

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.layers is None and self.method != "random"

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with fewer layers."""
        have = shape.num_hidden_layers
        if self.layers is not None:
            if sorted(set(self.layers)) != list(self.layers) or not 0 <= self.layers[0] <= self.layers[-1] < have:
                raise PlanError("layers", f"{list(self.layers)}: expected ascending indices from 0 to {have - 1}")
            return replace(shape, num_hidden_layers=len(self.layers))
        keep = resolve_size(self.num_hidden_layers, have)
        if not 1 <= keep <= have:
            raise PlanError("num_hidden_layers", f"{keep}: expected 1 to {have}, the source's number of layers")
        return replace(shape, num_hidden_layers=keep)

    def run(self, context: StageContext) -> None:
        """Choose the layers and write a checkpoint without the others."""
        scores, kept = self._choose(context)
        Rewrite(kept, {}, lambda _: {}).run(context.source, context.target, context.shape, context.progress)
        context.lineage = context.lineage.keep_layers(kept)
        context.decisions = {"kept_layers": list(kept), "scores": scores}

    def _choose(self, context: StageContext) -> tuple[list[float] | None, Indices]:
        if self.layers is not None:
            return None, self.layers
        present = context.lineage.layers
        if self.method == "random":
            scores = random_scores(len(present), context.seed, 0)
        else:
            statistics = context.statistics()
            scores = torch.stack([statistics.layer(layer)["block_influence"] for layer in present])
        return scores.tolist(), top(scores, context.shape.num_hidden_layers)
