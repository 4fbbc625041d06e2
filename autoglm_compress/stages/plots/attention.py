"""The plot of reading few tokens."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import KEPT, NEUTRAL, Record, layer_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_plot(record: Record) -> "Figure":
    """What each layer reads of the rows that were looked at; bars of another colour reach where all is read."""
    found = record["decisions"]
    whole = found["agreement"]["sequence_length"]
    read = [whole if top_k is None else min(top_k, whole) for top_k in found["top_k"]]
    everything = found["top_k"].count(None)
    title = f"Attention: {sum(read) / len(read):.0f} of {whole} tokens chosen by layers on average"
    title += f", everything by {everything} of {len(read)}" if everything else ""
    title += f"; held-out KL divergence {found['agreement']['kl_divergence']:.3g} nats"
    figure, (axes,) = new_figure(title, 3.0)
    colours = [NEUTRAL if top_k is None else KEPT for top_k in found["top_k"]]
    axes.bar(range(len(read)), read, 0.75, color=colours)
    axes.set(ylabel="tokens", ylim=(0, None))
    layer_axis(axes, len(read))
    return figure
