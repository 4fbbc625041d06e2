"""The plot of removing FFN neurons."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import DROPPED, KEPT, Record, kept_legend, layer_axis, new_figure
from autoglm_compress.stages.plots.record import method_of, of_before

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ffn_plot(record: Record) -> "Figure":
    """What share of each layer's score is kept."""
    shares = [min(100 * layer["kept_share_of_score"], 100) for layer in record["decisions"]["layers"]]
    layer, least = min(enumerate(shares), key=lambda share: share[1])
    size = f"{record['shape']['intermediate_size']}{of_before(record, 'intermediate_size')}"
    title = f"FFN: {size} neurons kept in every layer, {method_of(record)}"
    title += f"; layer {layer} keeps the least of its score, {least:.1f} %"
    figure, (axes,) = new_figure(title, 3.0)
    axes.bar(range(len(shares)), shares, 0.75, color=KEPT)
    axes.bar(range(len(shares)), [100 - share for share in shares], 0.75, bottom=shares, color=DROPPED)
    axes.set(ylabel="share of the score (%)", ylim=(0, 100))
    layer_axis(axes, len(shares))
    kept_legend(figure)
    return figure
