"""The plot of healing: the loss while training, and the checks on held-out rows that decided what was kept."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import DROPPED, KEPT, NEUTRAL, Record, line_legend, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heal_plot(record: Record) -> "Figure":
    """Loss and held-out divergence by tokens, and the learning rate below."""
    curve, checks, kept = (record["decisions"][name] for name in ("curve", "checks", "kept"))
    title = f"Heal: held-out KL divergence {checks[0]['divergence']:.3g} → {kept['divergence']:.3g} nats"
    title += f" after {kept['tokens'] / 1e6:.3g} M tokens" if kept["step"] else "; nothing was better than the start"
    figure, (losses, rates) = new_figure(title, 3.6, 2, sharex=True, height_ratios=[1, 0.3])
    tokens = [point["tokens"] / 1e6 for point in curve]
    losses.plot(tokens, [point["loss"] for point in curve], color=NEUTRAL, label="loss of the batches")
    at, divergences = zip(*((check["tokens"] / 1e6, check["divergence"]) for check in checks), strict=True)
    losses.plot(at, divergences, "o-", color=KEPT, label="KL divergence, held out (nats)")
    losses.plot([kept["tokens"] / 1e6], [kept["divergence"]], "o", color=DROPPED, markersize=7, label="kept")
    log_axis(losses, [*(point["loss"] for point in curve if point["loss"] > 0), *(d for d in divergences if d > 0)])
    rates.plot(tokens, [point["learning_rate"] for point in curve], color=NEUTRAL)
    rates.set(xlabel="million tokens", ylabel="learning rate", ylim=(0, None))
    line_legend(figure, losses)
    return figure
