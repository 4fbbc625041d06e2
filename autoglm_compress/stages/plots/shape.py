"""The plot of searching a shape."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import KEPT, NEUTRAL, Record, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shape_plot(record: Record) -> "Figure":
    """What each measured shape within the target costs, the chosen one first."""
    decisions = record["decisions"]
    trials = decisions["trials"]
    stages = [stage["options"] for stage in decisions["stages"]]
    chosen = ", ".join(" ".join(f"{value}" for value in options.values()) for options in stages)
    figure, (axes,) = new_figure(f"shape: the best of {len(trials)} measured shapes: {chosen}", 0.9 + 0.3 * len(trials))
    places = range(len(trials), 0, -1)
    axes.barh(places, [trial["kl_divergence"] for trial in trials], 0.7, color=[KEPT, *[NEUTRAL] * (len(trials) - 1)])
    axes.set_yticks(places, [_label(trial["sizes"]) for trial in trials])
    axes.set_xlabel("KL divergence of the predictions (nats), cut and not repaired")
    return figure


def _label(sizes: dict[str, int]) -> str:
    heads = f"{sizes['num_attention_heads']}/{sizes['num_key_value_heads']}"
    width = f"{sizes['hidden_size']} wide, FFN {sizes['intermediate_size']}"
    return f"{sizes['num_hidden_layers']} layers, {width}, heads {heads}"
