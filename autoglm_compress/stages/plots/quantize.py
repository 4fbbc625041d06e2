"""The plot of quantizing."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import Record, layer_axis, layer_lines, new_figure
from autoglm_compress.stages.plots.record import method_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def quantize_plot(record: Record) -> "Figure | None":
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
    title = f"Quantize: {kind}, {groups}, {method_of(record)}"
    figure, grid = new_figure(title, 3.4, 1, len(panels))
    for axes, (label, values) in zip(grid, panels.items(), strict=True):
        layer_lines(axes, {name: dict(enumerate(layer[name] for layer in values)) for name in values[0]})
        axes.set(title=label, ylim=(0, 1.05 * max(max(layer.values()) for layer in values)))
        layer_axis(axes, len(layers))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure
