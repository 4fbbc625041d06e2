"""One plot for each stage of what it decided, drawn from its `stage.json` alone, so that it can always be redrawn."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoglm_compress.progress import Progress
from autoglm_compress.records.stage import read_stage
from autoglm_compress.report.figures import (
    DROPPED,
    KEPT,
    NEUTRAL,
    Record,
    as_svg,
    kept_legend,
    kept_strip,
    layer_axis,
    layer_lines,
    line_legend,
    log_axis,
    new_figure,
)
from autoglm_compress.report.heal_plot import heal_plot
from autoglm_compress.report.refit_plot import refit_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT = "plot.svg"
MAP_WIDTH, HEAD_HEIGHT = 960, 16
"""Pixels of the map of heads: enough that a viewer which smooths images blurs no cell."""


def draw_missing(stage_file: Path, progress: Progress) -> None:
    """Draw the plot of a finished stage beside its `stage.json`, unless it is there; say why if that fails."""
    file = stage_file.with_name(PLOT)
    if file.exists():
        return
    try:
        plot = draw(read_stage(stage_file).as_data())
        if plot is not None:
            temporary = file.with_name(f".{PLOT}.partial")
            temporary.write_bytes(plot)
            temporary.replace(file)
    except Exception as error:  # whatever is wrong with a plot, the stage is done and its run can go on
        progress.note(f"warning: {stage_file.parent.name}: no {PLOT}: {type(error).__name__}: {error}")


def draw(record: Record) -> bytes | None:
    """An SVG of what a stage decided, None for a kind without a plot or a stage that had nothing to decide.

    Args:
        record: the content of `stage.json`.
    """
    make = PLOTS.get(record["options"]["stage"])
    return as_svg(lambda: make(record)) if make and record["decisions"] else None


def _of_before(record: Record, size: str) -> str:
    """` of N` for a size before the stage, which the records of older versions do not hold."""
    return f" of {record['shape_before'][size]}" if "shape_before" in record else ""


def _method(record: Record) -> str:
    """What a method is called; where a stage chose one, its decisions say which."""
    return (record["decisions"].get("method") or record["options"]["method"]).replace("_", " ")


def _depth(record: Record) -> "Figure":
    """The layers that are kept, with what the method measured of each layer, gap or block."""
    decisions = record["decisions"]
    kept, scores = set(decisions["kept_layers"]), decisions.get("scores")
    layers = record.get("shape_before", {}).get("num_hidden_layers", max(kept) + 1)
    title = f"Depth: {len(kept)}{_of_before(record, 'num_hidden_layers')} layers kept, {_method(record)}"
    if isinstance(scores, list):
        figure, (axes,) = new_figure(title, 3.0)
        layers = len(scores)
        axes.bar(range(layers), scores, 0.75, color=[KEPT if layer in kept else DROPPED for layer in range(layers)])
        axes.set_ylabel("score")
        if min(scores) > 0 and max(scores) > 30 * min(scores):
            log_axis(axes, scores)
    elif scores and not DEPTH_SCORES.keys().isdisjoint(scores):
        figure, (measured, axes) = new_figure(title, 3.2, 2, sharex=True, height_ratios=[1, 0.1])
        for name in DEPTH_SCORES.keys() & scores:
            DEPTH_SCORES[name](measured, scores[name])
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
    """For each run of dropped layers, as wide as it is, what it costs."""
    for gap in gaps:
        axes.bar(gap["layers"][0] - 0.375, gap["cost"], len(gap["layers"]) - 0.25, align="edge", color=DROPPED)
    axes.set(title=f"in all {sum(gap['cost'] for gap in gaps):.3g}", ylabel="cost of the gap (1 - cosine)")


def _removed(axes: "Axes", removed: list[dict[str, Any]]) -> None:
    """For each dropped layer how far predictions were from the start's after it went, and when that was."""
    bars = axes.bar([step["layer"] for step in removed], [step["kl_divergence"] for step in removed], color=DROPPED)
    axes.bar_label(bars, [str(number) for number in range(1, len(removed) + 1)], padding=2, fontsize=7)
    axes.set_ylabel("KL divergence (nats)\nafter removal; in what order")


def _heads(record: Record) -> "Figure":
    """A map of heads by layers: the colour says what became of a head, its strength the score."""
    import numpy
    from matplotlib.colors import to_rgb

    layers = record["decisions"]["layers"]
    heads = len(layers[0]["scores"])
    image = numpy.zeros((heads, len(layers), 4))
    for number, layer in enumerate(layers):
        scores = numpy.array(layer["scores"]).clip(0)
        image[:, number, :3] = [to_rgb(KEPT if head in layer["kept_heads"] else DROPPED) for head in range(heads)]
        image[:, number, 3] = numpy.minimum(0.2 + 0.8 * scores / max(scores.max(), 1e-30), 1)
    width = max(MAP_WIDTH // len(layers), 4)
    image = image.repeat(HEAD_HEIGHT, 0).repeat(width, 1)
    image[::HEAD_HEIGHT, :, 3] = image[:, ::width, 3] = 0  # gaps between cells
    title = f"Heads: {len(layers[0]['kept_heads'])} of {heads} query heads kept in every layer"
    groups = f"{len(layers[0]['kept_kv_heads'])}{_of_before(record, 'num_key_value_heads')} KV groups"
    figure, (axes,) = new_figure(f"{title}, {groups}, {_method(record)}", min(1.6 + 0.16 * heads, 6.5))
    extent = (-0.5, len(layers) - 0.5, -0.5, heads - 0.5)
    axes.imshow(image, aspect="auto", interpolation="none", origin="lower", extent=extent)
    axes.set(title="the stronger the colour, the higher the score within the layer", ylabel="query head")
    axes.grid(visible=False)
    layer_axis(axes, len(layers))
    kept_legend(figure)
    return figure


def _ffn(record: Record) -> "Figure":
    """What share of each layer's score is kept."""
    shares = [min(100 * layer["kept_share_of_score"], 100) for layer in record["decisions"]["layers"]]
    layer, least = min(enumerate(shares), key=lambda share: share[1])
    size = f"{record['shape']['intermediate_size']}{_of_before(record, 'intermediate_size')}"
    title = f"FFN: {size} neurons kept in every layer, {_method(record)}"
    title += f"; layer {layer} keeps the least of its score, {least:.1f} %"
    figure, (axes,) = new_figure(title, 3.0)
    axes.bar(range(len(shares)), shares, 0.75, color=KEPT)
    axes.bar(range(len(shares)), [100 - share for share in shares], 0.75, bottom=shares, color=DROPPED)
    axes.set(ylabel="share of the score (%)", ylim=(0, 100))
    layer_axis(axes, len(shares))
    kept_legend(figure)
    return figure


def _width(record: Record) -> "Figure | None":
    """The factors on the norms' gains, by which the stream's root mean square shrank or grew."""
    decisions = record["decisions"]
    if "gains" not in decisions:
        return None
    size = f"{record['shape']['hidden_size']}{_of_before(record, 'hidden_size')}"
    kept = f"{size} channels kept, {_method(record)}"
    if "share_of_energy" in decisions:
        kept = f"{size} directions kept, {_method(record)}, {100 * decisions['share_of_energy']:.1f} % of the energy"
    lines: dict[str, dict[int, float]] = {}
    layers = record["shape"]["num_hidden_layers"]
    for name, gain in decisions["gains"].items():
        *path, norm = name.removesuffix(".weight").split(".")
        layer = next((int(part) for part in path if part.isdigit()), layers)
        lines.setdefault(norm if layer < layers else f"final {norm}", {})[layer] = gain
    figure, (axes,) = new_figure(f"Width: {kept}", 3.0)
    axes.axhline(1.0, color=NEUTRAL, linewidth=0.8, linestyle="--")
    layer_lines(axes, _merged(lines))
    axes.set_ylabel("factor on the norm's gain")
    layer_axis(axes, layers + 1)
    line_legend(figure, axes)
    return figure


def _merged(lines: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Lines that lie on each other as one."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, values in lines.items():
        names.setdefault(tuple(values.items()), []).append(name)
    return {", ".join(same): dict(values) for values, same in names.items()}


def _tie(record: Record) -> "Figure":
    """How far the one matrix is from the embedding and from the head that it stands for."""
    errors = {"as embedding": record["decisions"]["input_error"], "as head": record["decisions"]["output_error"]}
    figure, (axes,) = new_figure(f"Tie: errors of the one matrix, {_method(record)}", 1.6)
    bars = axes.barh(list(errors), list(errors.values()), 0.6, color=KEPT)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("relative squared error")
    return figure


def _quantize(record: Record) -> "Figure | None":
    """Rounding errors of the weights and of the outputs of the linears that read one input; none of a peer's."""
    options, layers = record["options"], record["decisions"].get("layers")
    if layers is None:
        return None
    panels = {"relative error of the weight": [layer["weight_error"] for layer in layers]}
    if "pairs" in layers[0]:
        pairs = [{name: pair["output_error"] for name, pair in layer["pairs"].items()} for layer in layers]
        panels["squared error of what reads the output of …, relative"] = pairs
    groups = "a scale per output channel" if options["group_size"] == -1 else f"groups of {options['group_size']}"
    kind = "INT4 and INT8" if options["bits"] == "auto" else f"INT{options['bits']}"
    title = f"Quantize: {kind}, {groups}, {_method(record)}"
    figure, grid = new_figure(title, 3.4, 1, len(panels))
    for axes, (label, values) in zip(grid, panels.items(), strict=True):
        layer_lines(axes, {name: dict(enumerate(layer[name] for layer in values)) for name in values[0]})
        axes.set(title=label, ylim=(0, 1.05 * max(max(layer.values()) for layer in values)))
        layer_axis(axes, len(layers))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


DEPTH_SCORES: dict[str, Callable[["Axes", Any], None]] = {
    "block_distances": _block_distances,
    "gaps": _gaps,
    "removed": _removed,
}
PLOTS: dict[str, Callable[[Record], "Figure | None"]] = {
    "depth": _depth,
    "heads": _heads,
    "ffn": _ffn,
    "width": _width,
    "tie": _tie,
    "refit": refit_plot,
    "heal": heal_plot,
    "quantize": _quantize,
}
