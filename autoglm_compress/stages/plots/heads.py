"""The plot of removing attention heads."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import DROPPED, KEPT, Record, kept_legend, layer_axis, new_figure
from autoglm_compress.stages.plots.record import method_of, of_before

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAP_WIDTH, HEAD_HEIGHT = 960, 16
"""Pixels of the map of heads: enough that a viewer which smooths images blurs no cell."""


def heads_plot(record: Record) -> "Figure":
    """A map of heads by layers. The colour shows whether a head is kept; its strength shows the score."""
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
    groups = f"{len(layers[0]['kept_kv_heads'])}{of_before(record, 'num_key_value_heads')} KV groups"
    figure, (axes,) = new_figure(f"{title}, {groups}, {method_of(record)}", min(1.6 + 0.16 * heads, 6.5))
    extent = (-0.5, len(layers) - 0.5, -0.5, heads - 0.5)
    axes.imshow(image, aspect="auto", interpolation="none", origin="lower", extent=extent)
    axes.set(title="the stronger the colour, the higher the score within the layer", ylabel="query head")
    axes.grid(visible=False)
    layer_axis(axes, len(layers))
    kept_legend(figure)
    return figure
