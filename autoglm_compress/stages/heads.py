"""Remove attention heads."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.cutting.importance import choose_heads, random_scores
from autoglm_compress.cutting.surgery import Rewrite, cut_heads
from autoglm_compress.errors import PlanError
from autoglm_compress.figures import Record
from autoglm_compress.stages.base import Size, Stage, StageContext, require_alike_layers, resolve_size
from autoglm_compress.stages.plots.heads import heads_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heads(Stage):
    """Keep the query heads that matter most, as many in every KV group, so that plain engines load the result.

    `kv_heads` cuts whole KV groups too, which shrinks the KV cache and costs more accuracy; left out, all stay.
    `contribution` is the mean square of what a head adds to the residual stream, tr(W G W^T) with its columns W of
    o_proj and the Gram matrix G of its outputs. `activation` is Minitron's score (Muralidharan et al. 2024): the L2
    norm of a head's output, summed over tokens. `magnitude` is the norm of the head's columns of o_proj.
    """

    stage: Literal["heads"]
    num_attention_heads: Size
    kv_heads: Size | None = None
    method: Literal["contribution", "activation", "magnitude", "random"] = "contribution"

    @property
    def uses_calibration(self) -> bool:
        """Whether the choice of method looks at activations."""
        return self.method in ("contribution", "activation")

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with fewer heads; head_dim stays."""
        require_alike_layers(shape, self.stage)
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        keep = resolve_size(self.num_attention_heads, heads)
        keep_groups = groups if self.kv_heads is None else resolve_size(self.kv_heads, groups)
        if not 1 <= keep_groups <= groups:
            raise PlanError("kv_heads", f"{keep_groups}: expected 1 to {groups}, the source's num_key_value_heads")
        if not 1 <= keep <= heads:
            raise PlanError("num_attention_heads", f"{keep}: expected 1 to {heads}, the source's number of heads")
        if keep % keep_groups or keep // keep_groups > heads // groups:
            allowed = [keep_groups * size for size in range(1, heads // groups + 1)]
            raise PlanError(
                "num_attention_heads",
                f"{keep}: every one of the {keep_groups} KV groups must keep the same number of query heads, "
                f"of the {heads // groups} it has: expected one of {allowed}",
            )
        return replace(shape, num_attention_heads=keep, num_key_value_heads=keep_groups)

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """A map of heads by layers."""
        return heads_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose heads in every layer and write a checkpoint without the others."""
        before = context.source.shape
        scores, kept = [], []
        for layer in range(before.num_hidden_layers):
            score = self._score(context, layer)
            scores.append(score.tolist())
            kept.append(
                choose_heads(
                    score,
                    before.num_key_value_heads,
                    context.shape.num_attention_heads,
                    context.shape.num_key_value_heads,
                )
            )
        Rewrite(range(before.num_hidden_layers), {}, lambda layer: cut_heads(*kept[layer], before.head_dim)).run(
            context.source, context.target, context.shape, context.runtime.progress
        )
        context.lineage = context.lineage.keep_heads(tuple(h for h, _ in kept), tuple(g for _, g in kept))
        context.decisions = {
            "layers": [
                {"kept_heads": list(heads), "kept_kv_heads": list(groups), "scores": score}
                for (heads, groups), score in zip(kept, scores, strict=True)
            ]
        }

    def _score(self, context: StageContext, layer: int) -> torch.Tensor:
        """Scores [num_attention_heads] of the heads present in a layer."""
        present = context.lineage.heads[layer]
        if self.method == "random":
            return random_scores(len(present), context.seed, layer)
        origin = context.lineage.layers[layer]
        if self.method == "activation":
            return context.statistics().layer(origin)["head_norm"][list(present)]
        family = context.source.family
        name = f"{family.layer_prefix(layer)}{family.attention_output}.weight"
        columns = context.source.read(name).float().unflatten(1, (len(present), -1))
        if self.method == "magnitude":
            return columns.square().sum((0, 2)).sqrt()
        gram = context.statistics().layer(origin)["head_gram"][list(present)]
        return torch.einsum("oha,hac,ohc->h", columns, gram, columns)
