"""The plot of sharing an adapter."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import LINES, Record, line_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"average": "mean of the projections", "closed_form": "one, fitted", "trained": "and what is before it trained"}
BAR = 0.8


def share_adapter_plot(record: Record) -> "Figure":
    """The errors of each kind's features, for every adapter that was tried."""
    errors = record["decisions"]["errors"]
    kinds = sorted({kind for found in errors.values() for kind in found})
    kept = "trained" if record["decisions"]["trained"] else "closed_form"
    figure, (axes,) = new_figure(f"Share adapter, kept: {NAMES[kept]}", 2.4)
    size = BAR / len(errors)
    for number, (name, found) in enumerate(errors.items()):
        places = [place + size * number for place, kind in enumerate(kinds) if kind in found]
        bars = axes.barh(places, [found[kind] for kind in kinds if kind in found], size, color=LINES[number])
        bars.set_label(NAMES.get(name, name))
        axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.set_yticks([place + (BAR - size) / 2 for place in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("squared error of features, relative to their spread")
    line_legend(figure, axes)
    return figure
