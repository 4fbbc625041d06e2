"""The style of all plots, and their output as SVG.

matplotlib is imported only where a plot is drawn: it takes a second and 40 MB, and most commands draw nothing.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
"""The content of a `stage.json`."""

KEPT, DROPPED, NEUTRAL = "#3d85c6", "#e0812e", "#808080"
LINES = ("#3d85c6", "#e0812e", "#2ea37c", "#c95d9c", "#8f6fd1", "#b0902a", "#5fb0d6", "#c0504d")
WIDTH = 8.0
FEW_LAYERS = 16
"""Up to this many layers, a line has a dot for every layer."""

# A grey that shows on white and on black; text stays text, which keeps the files small.
STYLE = {
    "font.size": 9,
    "figure.titlesize": 10,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.minor.visible": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "autoglm-compress",
    "text.parse_math": False,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), NEUTRAL
)


def as_svg(make: "Callable[[], Figure | None]") -> bytes | None:
    """The SVG of a figure, in the style of all plots. The same data and matplotlib version give the same bytes."""
    from matplotlib import style

    # After a reset, so that neither a matplotlibrc nor settings of the calling program change the bytes.
    with style.context(STYLE, after_reset=True):
        figure = make()
        if figure is None:
            return None
        if layout := figure.get_layout_engine():
            layout.execute(figure)  # layout and ticks depend on each other: once more
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        return svg.getvalue()


def new_figure(
    title: str, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, row by row; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def layer_axis(axes: "Axes", layers: int, ticks: int = 10) -> None:
    """Make the horizontal axis that of the layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.7, layers - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")


def log_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic for these values, and label it with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 20 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def layer_lines(axes: "Axes", lines: dict[str, dict[int, float]]) -> None:
    """Draw a line for each name, through its values by layer."""
    for color, (label, values) in zip(LINES, lines.items(), strict=False):
        marker = "o" if len(values) <= FEW_LAYERS else ""
        axes.plot(list(values), list(values.values()), marker=marker, color=color, label=label)


def kept_strip(axes: "Axes", kept: set[int], layers: int) -> None:
    """A row of all layers, coloured by whether they are kept."""
    axes.bar(range(layers), 1, 0.75, color=[KEPT if layer in kept else DROPPED for layer in range(layers)])
    axes.yaxis.set_visible(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)


def kept_legend(figure: "Figure") -> None:
    """The legend of the two colours."""
    from matplotlib.patches import Patch

    handles = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="dropped")]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)


def line_legend(figure: "Figure", axes: "Axes") -> None:
    """One legend below the figure for all that one of its axes shows."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), columnspacing=1.2, handletextpad=0.5)
