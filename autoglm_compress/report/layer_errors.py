"""The measures of each linear of each layer, as a table and as a heat map."""

from typing import TYPE_CHECKING, Any

from autoglm_compress.figures import WIDTH
from autoglm_compress.report.numbers import plain
from autoglm_compress.report.tables import Cell, Column, Table, number_cell, text_cell, without_empty_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADINGS = {
    "layer": "layer",
    "part": "linear, or input of linears",
    "bits": "bits",
    "strength": "ridge strength",
    "error_before": "error before",
    "error_after": "error after",
    "ratio": "after / before",
    "weight_error": "weight error",
    "output_error": "output error",
    "divergence_at_4_bits": "KL at 4 bits",
}
TITLES = {
    "error_after": "Relative squared error after the refit",
    "ratio": "What the refit left of the error (1: all of it)",
    "weight_error": "Relative error of the weights",
    "output_error": "Relative squared error of the outputs of what reads …",
    "bits": "Bits",
}
"""The measures that are drawn, with the titles of their panels. Other measures are only in the table."""
SPREAD = 30
"""Colours are logarithmic if the ratio of the largest to the least value exceeds this."""
CELL_HEIGHT = 0.2

Entry = dict[str, Any]
"""An entry of `linears` in a `stage.json`: `layer`, `part` and the measures there are."""


def layer_table(name: str, entries: list[Entry]) -> Table:
    """All recorded measures, one row for each linear of each layer."""
    keys = list(dict.fromkeys([*HEADINGS, *(key for entry in entries for key in entry)]))
    columns = [Column(key, HEADINGS.get(key, key.replace("_", " ")), numeric=key != "part") for key in keys]
    rows = [[_cell(entry.get(key)) for key in keys] for entry in entries]
    return without_empty_columns(Table(name, columns, rows))


def _cell(value: Any) -> Cell:
    if isinstance(value, str | bool):
        return text_cell(value)
    return number_cell(value, str if isinstance(value, int) else plain)


def heat_map(entries: list[Entry]) -> "Figure | None":
    """A panel for each measure with a name in `TITLES`: linears down, layers across. None if there is nothing to draw.

    A single layer, or a head alone, is only in the table.
    """
    panels = {measure: _by_part(entries, measure) for measure in TITLES}
    panels = {measure: parts for measure, parts in panels.items() if any(len(values) > 1 for values in parts.values())}
    if not panels:
        return None
    from matplotlib.figure import Figure

    rows = [len(parts) for parts in panels.values()]
    figure = Figure(figsize=(WIDTH, sum(CELL_HEIGHT * count + 0.62 for count in rows)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows).flat
    layers = 1 + max(entry["layer"] for entry in entries if entry["layer"] is not None)
    for axes, (measure, parts) in zip(grid, panels.items(), strict=True):
        _panel(axes, parts, layers, measure)
    return figure


def _by_part(entries: list[Entry], measure: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        value = entry.get(measure)
        if value is not None and entry["layer"] is not None:
            found.setdefault(entry["part"].removeprefix("after "), {})[entry["layer"]] = value
    return found


def _panel(axes: "Axes", parts: dict[str, dict[int, float]], layers: int, measure: str) -> None:
    import numpy
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    values = numpy.full((len(parts), layers), numpy.nan)
    for number, by_layer in enumerate(parts.values()):
        values[number, list(by_layer)] = list(by_layer.values())
    positive = values[values > 0]
    logarithmic = positive.size > 0 and positive.max() > SPREAD * positive.min()
    norm = LogNorm(positive.min(), positive.max()) if logarithmic else Normalize(0, max(1e-12, numpy.nanmax(values)))
    cells = numpy.clip(values, norm.vmin, None)
    image = axes.imshow(cells, cmap="viridis", norm=norm, aspect="auto", interpolation="none")
    axes.set(title=TITLES[measure], yticks=range(len(parts)), yticklabels=list(parts))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=8, fraction=0.05)
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_locator(LogLocator() if logarithmic else MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
