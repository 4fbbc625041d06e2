"""The plot of narrowing the residual stream."""

from typing import TYPE_CHECKING

from autoglm_compress.figures import NEUTRAL, Record, layer_axis, layer_lines, line_legend, new_figure
from autoglm_compress.stages.plots.record import method_of, of_before

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def width_plot(record: Record) -> "Figure | None":
    """The factors on the norms' gains, by which the stream's root mean square shrank or grew."""
    decisions = record["decisions"]
    if "gains" not in decisions:
        return None
    size = f"{record['shape']['hidden_size']}{of_before(record, 'hidden_size')}"
    kept = f"{size} channels kept, {method_of(record)}"
    if "share_of_energy" in decisions:
        kept = f"{size} directions kept, {method_of(record)}, {100 * decisions['share_of_energy']:.1f} % of the energy"
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
