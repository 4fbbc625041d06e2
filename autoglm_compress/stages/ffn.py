"""Remove FFN neurons."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.cutting.importance import random_scores, top
from autoglm_compress.cutting.surgery import Rewrite, cut_neurons
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.stages.base import Size, Stage, StageContext, require_alike_layers, resolve_size
from autoglm_compress.stages.plots.ffn import ffn_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Ffn(Stage):
    """Keep the FFN neurons that matter most.

    `contribution` is the norm of what a neuron adds to the residual stream: that of its activation times that of its
    column of down_proj. `activation` is Minitron's score (Muralidharan et al. 2024): the L2 norm over tokens of the
    neuron's activation. `magnitude` is the norm of the neuron's column of down_proj.
    """

    stage: Literal["ffn"]
    intermediate_size: Size
    method: Literal["contribution", "activation", "magnitude", "random"] = "contribution"

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.method in ("contribution", "activation")

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with fewer neurons."""
        require_alike_layers(shape, self.stage)
        keep = resolve_size(self.intermediate_size, shape.intermediate_size)
        if not 1 <= keep <= shape.intermediate_size:
            raise PlanError("intermediate_size", f"{keep}: expected 1 to {shape.intermediate_size}, the source's size")
        return replace(shape, intermediate_size=keep)

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """What share of each layer's score is kept."""
        return ffn_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose neurons in every layer and write a checkpoint without the others."""
        before = context.source.shape
        scores = [neuron_scores(context, self.method, layer) for layer in range(before.num_hidden_layers)]
        kept = tuple(top(score, context.shape.intermediate_size) for score in scores)
        Rewrite(
            range(before.num_hidden_layers), {}, lambda layer: cut_neurons(kept[layer], before.intermediate_size)
        ).run(context.source, context.target, context.shape, context.runtime.progress)
        context.lineage = context.lineage.keep_neurons(kept)
        context.decisions = {
            "layers": [
                {"kept_share_of_score": float(score[list(neurons)].sum() / score.sum().clamp_min(1e-30))}
                for score, neurons in zip(scores, kept, strict=True)
            ]
        }


def neuron_scores(context: StageContext, method: str, layer: int) -> torch.Tensor:
    """Scores [intermediate_size] of the neurons present in a layer of a stage's source, by a method of `Ffn`."""
    present = context.lineage.neurons[layer]
    if method == "random":
        return random_scores(len(present), context.seed, layer)
    family = context.source.family
    columns = context.source.read(f"{family.layer_prefix(layer)}{family.mlp_output}.weight").float().norm(dim=0)
    if method == "magnitude":
        return columns
    activation = context.statistics().layer(context.lineage.layers[layer])["neuron_norm"][list(present)]
    return activation if method == "activation" else activation * columns
