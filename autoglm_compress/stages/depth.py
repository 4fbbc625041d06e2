"""Drop whole decoder layers."""

from dataclasses import replace
from math import pi
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.cutting.importance import random_scores, top
from autoglm_compress.cutting.layer_choice import (
    gaps,
    greedy_memory,
    keep_chain,
    keep_without_block,
    remove_greedily,
    state_distances,
    states_memory,
)
from autoglm_compress.cutting.lineage import Indices
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.stages.base import Size, Stage, StageContext, resolve_size
from autoglm_compress.stages.needs import Needs
from autoglm_compress.stages.plots.depth import depth_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Depth(Stage):
    """Keep the layers that a method chooses, or those that are listed.

    `chain` drops the set of layers, contiguous or not, whose gaps cost least in all: a gap costs 1 - mean cosine of the
    states at its two ends, and dynamic programming finds the set. `block_influence` keeps the layers with the highest
    score of ShortGPT (Men et al. 2024), 1 - mean cosine of a layer's input and output. `angular` drops the one
    contiguous block whose input and output states have the smallest mean angular distance, arccos(cosine) / pi (Gromov
    et al. 2024). `greedy_loss` removes, one after the other, the layer without which the next-token distributions stay
    closest to those of the checkpoint it cuts, by KL divergence: it runs the model with each layer left out, where the
    others read cached statistics, and is meant for small models or a GPU. `random` keeps layers by chance.

    The statistics are those of the run's source. Where layers were dropped before, `angular` and `chain` compare the
    states that enter the present layers there: a layer before an earlier gap counts as also doing the gap's work, as a
    refit makes it do. Other earlier changes to the checkpoint do not count. `greedy_loss` measures the checkpoint as it
    is. First layers after which a tower adds features once more always stay.
    """

    stage: Literal["depth"]
    num_hidden_layers: Size | None = None
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    method: Literal["chain", "block_influence", "angular", "greedy_loss", "random"] = "chain"

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
            if self.layers[: shape.first_layers] != tuple(range(shape.first_layers)):
                raise PlanError("layers", f"{list(self.layers)}: {_first_layers(shape)}")
            return shape.with_layers(self.layers)
        assert self.num_hidden_layers is not None  # options without either are refused
        keep = resolve_size(self.num_hidden_layers, have)
        if not 1 <= keep <= have:
            raise PlanError("num_hidden_layers", f"{keep}: expected 1 to {have}, the source's number of layers")
        if keep < shape.first_layers:
            raise PlanError("num_hidden_layers", f"{keep}: {_first_layers(shape)}")
        if shape.family.layer_kinds is not None:
            raise PlanError(
                "num_hidden_layers",
                f"the layers of {shape.family.architecture} differ in their tensors ({', '.join(shape.layer_kinds)}), "
                "so what is left must be known before: give the layers to keep as `layers: [0, 2, …]`",
            )
        return shape.with_layers(range(keep))

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """The sampled states at every boundary, or what `remove_greedily` holds."""
        if not self.uses_calibration:
            return Needs()
        if self.method == "greedy_loss":
            return Needs(memory=greedy_memory(shape, calibration.tokens))
        measured = super().needs(shape, source, calibration)
        states = states_memory(shape) if self.method in ("angular", "chain") else 0
        return replace(measured, memory=max(measured.memory, states))

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """The layers that are kept, with what the method measured."""
        return depth_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose the layers and write a checkpoint without the others."""
        kept, scores = self._choose(context)
        Rewrite(kept, {}, lambda _: {}).run(context.source, context.target, context.shape, context.runtime.progress)
        context.lineage = context.lineage.keep_layers(kept)
        method = "listed" if self.layers else self.method
        context.decisions = {"method": method, "kept_layers": list(kept), "scores": scores}

    def _choose(self, context: StageContext) -> tuple[Indices, Any]:
        """The layers to keep, and what the method measured of them."""
        keep, have = context.shape.num_hidden_layers, context.source.shape.num_hidden_layers
        first = context.source.shape.first_layers
        if self.layers is not None:
            return self.layers, None
        if self.method == "random":
            scores = random_scores(have, context.seed, 0)
            return _highest(scores, keep, first), scores.tolist()
        if self.method == "block_influence":
            statistics = context.statistics()
            scores = torch.stack([statistics.layer(layer)["block_influence"] for layer in context.lineage.layers])
            return _highest(scores, keep, first), scores.tolist()
        if self.method == "angular":
            distances = state_distances(_boundaries(context), lambda cosine: cosine.arccos() / pi)
            kept, across = keep_without_block(distances, keep, first)
            return kept, {"block_distances": across}
        if self.method == "chain":
            costs = state_distances(_boundaries(context), lambda cosine: 1 - cosine)
            kept = keep_chain(costs, keep, first)
            found = [{"layers": [*range(*gap)], "cost": float(costs[gap])} for gap in gaps(kept, have)]
            return kept, {"total_cost": sum(gap["cost"] for gap in found), "gaps": found}
        removed = remove_greedily(
            context.source,
            context.text.batches,
            keep,
            first=first,
            runtime=context.runtime,
            file=context.work / "removed.json",
        )
        gone = {step["layer"] for step in removed}
        return tuple(layer for layer in range(have) if layer not in gone), {"removed": removed}


def _highest(scores: torch.Tensor, keep: int, first: int) -> Indices:
    """The first layers that have to stay, and of the others those with the highest scores [layers]."""
    scores = scores.clone()
    scores[:first] = torch.inf
    return top(scores, keep)


def _first_layers(shape: ModelShape) -> str:
    """Why the first layers have to stay."""
    return (
        f"the model adds features of images after each of the first {shape.first_layers} layers, so these have to stay"
    )


def _boundaries(context: StageContext) -> list[torch.Tensor]:
    """The sampled states [tokens, hidden_size] that enter each present layer, and those after the last."""
    statistics = context.statistics()
    return [statistics.layer(layer)["boundary"] for layer in context.lineage.layers] + [statistics.final()["boundary"]]
