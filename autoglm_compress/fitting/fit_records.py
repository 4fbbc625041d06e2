"""Records of fits: for each linear, and as entries for a table of all linears."""

from collections.abc import Iterable, Iterator
from typing import Any

from autoglm_compress.fitting.descent import Descent
from autoglm_compress.fitting.ridge import Fit

WHOLE_LAYER, HEAD = "whole layer", "head"


def losses_record(descent: Descent | None) -> dict[str, float] | None:
    """The losses before and after gradient descent, if there was any."""
    if descent is None:
        return None
    return {"loss_before": float(f"{descent.before:.4g}"), "loss_after": float(f"{descent.after:.4g}")}


def has_changed(fits: Iterable[dict[str, Any]], descent: Descent | None) -> bool:
    """Whether any fit, by its record, or gradient descent improved on the weights before."""
    return any(fit["strength"] is not None for fit in fits) or (descent is not None and descent.improved)


def fit_record(fit: Fit) -> dict[str, Any]:
    """The ridge strength and the relative squared errors of a linear's fit."""
    return {
        "strength": fit.strength,
        "error_before": float(f"{fit.error_before:.4g}"),
        "error_after": float(f"{fit.error_after:.4g}"),
    }


def fitted_linears(decisions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The errors of every linear of each layer, of each layer as a whole, of the head, and of the linears by which
    towers write to the residual stream, from a refit's decisions.
    """
    for number, layer in enumerate(decisions["layers"]):
        for linear, fit in layer.items():
            yield {"layer": number, "part": linear} | _with_ratio(fit)
    for number, descent in enumerate(decisions["distilled_layers"]):
        if descent:
            yield {"layer": number, "part": WHOLE_LAYER} | _of_descent(descent)
    if "head" in decisions:
        yield {"layer": None, "part": HEAD} | _with_ratio(decisions["head"])
    for bridge, fit in decisions.get("bridges", {}).items():
        yield {"layer": None, "part": bridge} | _with_ratio(fit)


def _of_descent(descent: dict[str, float]) -> dict[str, Any]:
    """Where gradient descent did not help, it was not used."""
    before, after = descent["loss_before"], descent["loss_after"]
    return _with_ratio({"error_before": before, "error_after": min(before, after)})


def _with_ratio(fit: dict[str, Any]) -> dict[str, Any]:
    before = fit["error_before"]
    return {**fit, "ratio": fit["error_after"] / before if before else None}
