"""Which attention heads to keep: what `heads` does, and `width` where head_dim hangs on both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.cutting.importance import choose_heads, random_scores
from autoglm_compress.cutting.lineage import Indices, Lineage
from autoglm_compress.cutting.surgery import Cut, cut_heads
from autoglm_compress.errors import PlanError
from autoglm_compress.stages.base import StageContext, resolve_size


def with_heads(shape: ModelShape, num_attention_heads: int | str, kv_heads: int | str | None) -> ModelShape:
    """The shape with fewer heads; head_dim stays.

    Raises:
        PlanError: KV groups would not keep the same number of query heads.
    """
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    keep = resolve_size(num_attention_heads, heads)
    keep_groups = groups if kv_heads is None else resolve_size(kv_heads, groups)
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


@dataclass(frozen=True)
class HeadChoice:
    """The query heads and KV heads that every layer keeps, and the scores of all its query heads."""

    heads: tuple[Indices, ...]
    key_value_heads: tuple[Indices, ...]
    scores: Sequence[list[float]]
    head_dim: int

    def cut(self, layer: int) -> Cut:
        """What is kept of a layer."""
        return cut_heads(self.heads[layer], self.key_value_heads[layer], self.head_dim)

    def left_of(self, lineage: Lineage) -> Lineage:
        """The lineage without the other heads."""
        return lineage.keep_heads(self.heads, self.key_value_heads)

    def as_data(self) -> list[dict[str, Any]]:
        """Plain data, an entry for each layer."""
        chosen = zip(self.heads, self.key_value_heads, self.scores, strict=True)
        return [
            {"kept_heads": list(heads), "kept_kv_heads": list(groups), "scores": scores}
            for heads, groups, scores in chosen
        ]


def choose(context: StageContext, method: str) -> HeadChoice:
    """Choose heads in every layer of a stage's source, by a method of the stage `heads`."""
    before, after = context.source.shape, context.shape
    scores = [head_scores(context, method, layer) for layer in range(before.num_hidden_layers)]
    kept = [
        choose_heads(score, before.num_key_value_heads, after.num_attention_heads, after.num_key_value_heads)
        for score in scores
    ]
    heads, groups = zip(*kept, strict=True)
    return HeadChoice(heads, groups, [score.tolist() for score in scores], before.head_dim)


def head_scores(context: StageContext, method: str, layer: int) -> torch.Tensor:
    """Scores [num_attention_heads] of the heads present in a layer of a stage's source, by a method of `heads`."""
    present = context.lineage.heads[layer]
    if method == "random":
        return random_scores(len(present), context.seed, layer)
    origin = context.lineage.layers[layer]
    if method == "activation":
        return context.statistics().layer(origin)["head_norm"][list(present)]
    family = context.source.family
    name = f"{family.layer_prefix(layer)}{family.attention_output}.weight"
    columns = context.source.read(name).float().unflatten(1, (len(present), -1))
    if method == "magnitude":
        return columns.square().sum((0, 2)).sqrt()
    gram = context.statistics().layer(origin)["head_gram"][list(present)]
    return torch.einsum("oha,hac,ohc->h", columns, gram, columns)
