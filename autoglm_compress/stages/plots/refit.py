"""The plot of a refit: the errors of each linear of each layer before and after."""

from statistics import median
from typing import TYPE_CHECKING, Any

from autoglm_compress.figures import DROPPED, NEUTRAL, Record, layer_axis, line_legend, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_ERROR = 1e-7
"""Smaller errors are drawn as this one, because a logarithmic axis has no zero."""
DESCENT = "gradient descent"


def refit_plot(record: Record) -> "Figure":
    """A panel per linear: the errors before, and after in the colour of the ridge strength that was chosen."""
    layers, head = record["decisions"]["layers"], record["decisions"].get("head")
    panels: dict[str, dict[int, dict[str, Any]]] = {}
    for number, layer in enumerate(layers):
        for name, fit in layer.items():
            panels.setdefault(name, {})[number] = fit
    distilled = enumerate(record["decisions"].get("distilled_layers", []))
    descents = {number: descent for number, descent in distilled if descent}
    fits = [(fit, number, linear) for linear, panel in panels.items() for number, fit in panel.items()]
    before, after = (median(fit[error] for fit, *_ in fits) for error in ("error_before", "error_after"))
    worst, number, linear = max(fits, key=lambda found: found[0]["error_after"])
    title = f"Refit: median error {before:.3g} → {after:.3g}; worst: {_change(worst)}, layer {number}, {linear}"
    ends = [f"head: {_change(head)}"] if head else []
    if record["options"].get("logit_passes"):
        # The last part before the logits is the head, or the last layer where the head is tied.
        to_logits = record["decisions"].get("distilled_head") if head else descents.pop(len(layers) - 1, None)
        ends += [f"next-token KL divergence: {_change(_as_fit(to_logits))}"] if to_logits else []
    if descents:
        panels["whole layer"] = {number: _as_fit(descent) for number, descent in descents.items()}
    columns = 3 if len(panels) <= 6 else 4
    rows = -(-len(panels) // columns)
    title = "\n".join((title, "; ".join(ends))).strip()
    figure, grid = new_figure(title, 1.0 + 1.7 * rows, rows, columns, sharex=True, sharey=True)
    shown = [fit for panel in panels.values() for fit in panel.values()]
    log_axis(grid[0], [_drawn(fit[error]) for fit in shown for error in ("error_before", "error_after")])
    for axes, (name, panel) in zip(grid, panels.items(), strict=False):
        _fits(axes, panel, {fit["strength"] for fit in shown})
        axes.set_title(name)
        layer_axis(axes, len(layers), ticks=6)
        axes.label_outer()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("relative squared error", fontsize=9)
    line_legend(figure, grid[0])
    return figure


def _fits(axes: "Axes", panel: dict[int, dict[str, Any]], strengths: set[float | str | None]) -> None:
    """Errors by layer, before and after; all strengths of the figure get a label, for any panel to stand for all."""
    from matplotlib import colormaps
    from numpy import linspace

    axes.plot(list(panel), [_drawn(fit["error_before"]) for fit in panel.values()], color=NEUTRAL, label="before")
    tried = sorted(strength for strength in strengths if isinstance(strength, float))
    looks: dict[float | str | None, tuple[str, Any, Any]] = {
        None: ("kept as it was", NEUTRAL, "none"),
        DESCENT: (DESCENT, DROPPED, DROPPED),
    }
    for strength, color in zip(tried, colormaps["viridis"](linspace(0.4, 0.8, len(tried))), strict=True):
        looks[strength] = (f"strength {strength:g}", color, color)
    for kind, (label, color, fill) in looks.items():
        chosen = [layer for layer, fit in panel.items() if fit["strength"] == kind]
        if kind in strengths:
            after = [_drawn(panel[layer]["error_after"]) for layer in chosen]
            axes.plot(chosen, after, "o", color=color, markerfacecolor=fill, label=label)


def _drawn(error: float) -> float:
    return max(error, SMALLEST_ERROR)


def _as_fit(descent: dict[str, float]) -> dict[str, Any]:
    """What gradient descent did in the form of a fit: where it did not help, it was not used."""
    before, after = descent["loss_before"], descent["loss_after"]
    strength = DESCENT if after < before else None
    return {"strength": strength, "error_before": before, "error_after": min(before, after)}


def _change(fit: dict[str, Any]) -> str:
    return f"{fit['error_before']:.3g} → {fit['error_after']:.3g}"
