"""Plots of one or several runs: size against quality, and time and memory by stage."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from autoglm_compress.figures import KEPT, LINES, NEUTRAL, WIDTH, line_legend, log_axis, new_figure
from autoglm_compress.records.metrics import Row
from autoglm_compress.report.chain import checkpoints, final_checkpoints, parents
from autoglm_compress.report.numbers import duration, size
from autoglm_compress.report.run_record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_WIDTH, CURVE_HEIGHT = 5.2, 3.4
MANY = 16
"""With more checkpoints than this, a curve names only the source and the final ones."""
LABEL_SIZE, LETTER = 7.5, 4.3
"""Points: the size of a label, and about how wide a letter of it is."""
PLOT_SHARE = 0.83
"""About how much of a figure the axes take, each way."""


@dataclass(frozen=True)
class Measure:
    """The vertical axis of a curve over size."""

    field: str
    heading: str
    scale: float = 1.0


PERPLEXITY, ACCURACY = Measure("perplexity", "perplexity"), Measure("accuracy", "accuracy (%)", 100.0)


def size_curve(runs: dict[str, Run], measure: Measure) -> "Figure | None":
    """Size against a measure, a series for each run by its name; None where fewer than two checkpoints have both."""
    series = {name: _known(run, measure) for name, run in runs.items()}
    points = [point for found in series.values() for point in found.values()]
    if len(points) < 2:
        return None
    figure, (axes,) = new_figure("", CURVE_HEIGHT)
    figure.set_size_inches(CURVE_WIDTH, CURVE_HEIGHT)
    values = [value for _, value in points]
    if measure is PERPLEXITY and max(values) > 3 * min(values):
        log_axis(axes, values)
    for color, (name, found) in zip(_colors(len(series)), series.items(), strict=True):
        _edges(axes, runs[name], found, color)
        axes.plot(*zip(*found.values(), strict=True), "o", color=color, label=name) if found else None
    axes.set(xlabel="size (MB)", ylabel=measure.heading)
    axes.margins(0.09)
    if len(series) > 1:
        line_legend(figure, axes)
        figure.legends[0].set_ncols(2)
    _name_points(axes, [(label, found[name]) for label, name, found in _labels(runs, series)])
    return figure


def _colors(count: int) -> list[str]:
    return [LINES[number % len(LINES)] for number in range(count)]


def _known(run: Run, measure: Measure) -> dict[str, tuple[float, float]]:
    """The place of each checkpoint whose size and measure are known, by its name."""
    places = {row.name: (row.bytes, getattr(row, measure.field)) for row in checkpoints(run)}
    return {
        name: (weight / 1e6, measure.scale * value)
        for name, (weight, value) in places.items()
        if weight is not None and value is not None and math.isfinite(value)
    }


def _edges(axes: "Axes", run: Run, known: dict[str, tuple[float, float]], color: str) -> None:
    """A line from each checkpoint to the nearest one before it that was measured."""
    parent_of = parents(run)
    for name, place in known.items():
        before = parent_of[name]
        while before is not None and before not in known:
            before = parent_of[before]
        if before is not None:
            axes.plot(*zip(known[before], place, strict=True), color=color, alpha=0.5)


def _labels(
    runs: dict[str, Run], series: dict[str, dict[str, tuple[float, float]]]
) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
    """The checkpoints to be named: all of a single run as far as there is room, else those that matter most."""
    room = len(runs) == 1 and len(checkpoints(next(iter(runs.values())))) <= MANY
    for number, (name, run) in enumerate(runs.items()):
        ends = final_checkpoints(run)
        source = [run.source] if run.source and number == 0 else []
        rows: list[Row] = checkpoints(run) if room else [*source, *ends] if len(ends) <= MANY else source
        yield from ((row.label, row.name, series[name]) for row in rows if row.name in series[name])


def _name_points(axes: "Axes", labels: list[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside points, where there is room for them; where there is none, a name is left out."""
    figure = cast("Figure", axes.figure)  # no part of one: these plots have no subfigures
    width, height = figure.get_size_inches() * 72 * PLOT_SHARE
    taken: list[tuple[float, float, float, float]] = []
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [(label, point, to_axes.transform(point) * (width, height)) for label, point in labels]
    taken += [(x - 3, y - 3, x + 3, y + 3) for _, _, (x, y) in places]
    for label, point, (x, y) in places:
        long = LETTER * len(label)
        for dx, dy in ((5, 3), (5, -9), (-5 - long, 3), (-5 - long, -9), (-long / 2, 7), (-long / 2, -14)):
            box = (x + dx, y + dy, x + dx + long, y + dy + LABEL_SIZE)
            inside = box[0] > 0 and box[2] < width + 12 and box[1] > 0 and box[3] < height + 6
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(label, point, (dx, dy), textcoords="offset points", fontsize=LABEL_SIZE)
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def cost_plot(run: Run) -> "Figure | None":
    """Seconds and peak memory of each stage and of its evaluation; None where nothing was recorded."""
    rows = [row for row in checkpoints(run) if row.seconds or row.name in run.evaluations]
    if not rows:
        return None
    names = [row.name for row in rows]
    evaluated = [run.evaluations[name].resources if name in run.evaluations else None for name in names]
    # The row of the source has the cost of its evaluation already.
    own = [row if row is not run.source else None for row in rows]
    figure, (time, memory) = new_figure("", 0.9 + 0.3 * len(rows), 1, 2, sharey=True)
    figure.set_size_inches(WIDTH, 0.9 + 0.3 * len(rows))
    _bars(time, [[(cost and cost.seconds) or 0.0 for cost in costs] for costs in (own, evaluated)], duration)
    _bars(memory, [[(cost and cost.peak_rss_bytes) or 0.0 for cost in costs] for costs in (own, evaluated)], size)
    time.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6), title="time")
    memory.set(title="peak memory")
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2)
    return figure


def _bars(axes: "Axes", costs: list[list[float]], show: Callable[[float], str]) -> None:
    """Two bars for each row, one below the other, with what they amount to."""
    looks = ((-0.2, KEPT, "stage"), (0.2, NEUTRAL, "its evaluation"))
    for (offset, color, label), values in zip(looks, costs, strict=True):
        bars = axes.barh([row + offset for row in range(len(values))], values, 0.36, color=color, label=label)
        axes.bar_label(bars, [show(value) if value else "" for value in values], padding=3, fontsize=7)
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_visible(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0)
