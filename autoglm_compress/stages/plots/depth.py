"""The plot of dropping layers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autoglm_compress.figures import (
    DROPPED,
    KEPT,
    NEUTRAL,
    Record,
    kept_legend,
    kept_strip,
    layer_axis,
    log_axis,
    new_figure,
)
from autoglm_compress.stages.plots.record import method_of, of_before

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def depth_plot(record: Record) -> "Figure":
    """The layers that are kept, with what the method measured of each layer, gap or block."""
    decisions = record["decisions"]
    kept, scores = set(decisions["kept_layers"]), decisions.get("scores")
    layers = record.get("shape_before", {}).get("num_hidden_layers", max(kept) + 1)
    title = f"Depth: {len(kept)}{of_before(record, 'num_hidden_layers')} layers kept, {method_of(record)}"
    if isinstance(scores, list):
        figure, (axes,) = new_figure(title, 3.0)
        layers = len(scores)
        axes.bar(range(layers), scores, 0.75, color=[KEPT if layer in kept else DROPPED for layer in range(layers)])
        axes.set_ylabel("score")
        if min(scores) > 0 and max(scores) > 30 * min(scores):
            log_axis(axes, scores)
    elif scores and not SCORES.keys().isdisjoint(scores):
        figure, (measured, axes) = new_figure(title, 3.2, 2, sharex=True, height_ratios=[1, 0.1])
        for name in SCORES.keys() & scores:
            SCORES[name](measured, scores[name])
        measured.grid(visible=False, axis="x")
        kept_strip(axes, kept, layers)
    else:
        figure, (axes,) = new_figure(title, 1.2)
        kept_strip(axes, kept, layers)
    layer_axis(axes, layers)
    kept_legend(figure)
    return figure


def _block_distances(axes: "Axes", distances: list[float]) -> None:
    """For each layer that the dropped block could begin with, the distance across the block."""
    axes.plot(distances, "o-", color=NEUTRAL)
    best = min(distances)
    axes.plot([distances.index(best)], [best], "o", color=DROPPED, markersize=6)
    axes.set_ylabel("angular distance across\na block from this layer")


def _gaps(axes: "Axes", gaps: list[dict[str, Any]]) -> None:
    """The cost of each run of dropped layers, drawn as wide as the run."""
    for gap in gaps:
        axes.bar(gap["layers"][0] - 0.375, gap["cost"], len(gap["layers"]) - 0.25, align="edge", color=DROPPED)
    axes.set(title=f"in all {sum(gap['cost'] for gap in gaps):.3g}", ylabel="cost of the gap (1 - cosine)")


def _removed(axes: "Axes", removed: list[dict[str, Any]]) -> None:
    """For each dropped layer, the divergence from the start's predictions after its removal, and its place in the
    order.
    """
    bars = axes.bar([step["layer"] for step in removed], [step["kl_divergence"] for step in removed], color=DROPPED)
    axes.bar_label(bars, [str(number) for number in range(1, len(removed) + 1)], padding=2, fontsize=7)
    axes.set_ylabel("KL divergence (nats)\nafter removal; in what order")


SCORES: dict[str, Callable[["Axes", Any], None]] = {
    "block_distances": _block_distances,
    "gaps": _gaps,
    "removed": _removed,
}
