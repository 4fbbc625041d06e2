"""Records of each linear after quantizing, as entries for a table of all linears."""

from typing import Any


def rounded_linears(decisions: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors and bits of every linear, and of what reads the output of one, from the decisions of quantizing."""
    found: dict[tuple[int, str], dict[str, Any]] = {}

    def entry(layer: int, part: str) -> dict[str, Any]:
        return found.setdefault((layer, part), {"layer": layer, "part": part})

    for number, layer in enumerate(decisions.get("layers", ())):  # AutoAWQ does not report them
        for linear, error in layer["weight_error"].items():
            entry(number, linear)["weight_error"] = error
        for name, pair in layer.get("pairs", {}).items():
            entry(number, f"after {name}").update(_cells(pair))
    for choice in decisions.get("bits", ()):
        for part in choice["parts"]:
            entry(choice["layer"], part).update(_cells(choice))
    return list(found.values())


def _cells(measures: dict[str, Any]) -> dict[str, Any]:
    """The values that a table cell can hold."""
    return {name: value for name, value in measures.items() if value is None or isinstance(value, str | int | float)}
