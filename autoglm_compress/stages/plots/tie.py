"""The plot of tying embedding and head."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import KEPT, Record, new_figure
from autoglm_compress.stages.plots.record import method_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tie_plot(record: Record) -> "Figure":
    """How far the one matrix is from the embedding and from the head that it stands for."""
    errors = {"as embedding": record["decisions"]["input_error"], "as head": record["decisions"]["output_error"]}
    figure, (axes,) = new_figure(f"Tie: errors of the one matrix, {method_of(record)}", 1.6)
    bars = axes.barh(list(errors), list(errors.values()), 0.6, color=KEPT)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("relative squared error")
    return figure
