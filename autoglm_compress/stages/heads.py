"""Remove attention heads."""

from typing import TYPE_CHECKING, Literal

from autoglm_compress.architecture import ModelShape
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.figures import Record
from autoglm_compress.stages.base import Size, Stage, StageContext, require_alike_layers
from autoglm_compress.stages.head_choice import choose, with_heads
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
        return with_heads(shape, self.num_attention_heads, self.kv_heads)

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        """A map of heads by layers."""
        return heads_plot(record)

    def run(self, context: StageContext) -> None:
        """Choose heads in every layer and write a checkpoint without the others."""
        chosen = choose(context, self.method)
        layers = range(context.source.shape.num_hidden_layers)
        Rewrite(layers, {}, chosen.cut).run(context.source, context.target, context.shape, context.runtime.progress)
        context.lineage = chosen.left_of(context.lineage)
        context.decisions = {"layers": chosen.as_data()}
