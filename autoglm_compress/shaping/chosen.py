"""The surgeries that were chosen, as a recipe to read, to change and to run by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoglm_compress.atomic import appearing
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.text import PYTHON_DOCS


def chosen_recipe(
    name: str, source: Path, text: CalibrationText, seed: int, stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A recipe of these stages on a model, with the calibration that they were chosen by."""
    options = text.options
    places = {source: PYTHON_DOCS if path is None else str(path.resolve()) for source, path in text.files.items()}
    calibration = options.model_dump(mode="json")
    if isinstance(options.source, str):
        calibration["source"] = places[options.source]
    elif isinstance(options.source, dict):
        calibration["source"] = {places[source]: share for source, share in options.source.items()}
    return {
        "name": name,
        "model": {"source": str(source.resolve())},
        "calibration": calibration,
        "seed": seed,
        "stages": [dict(stage) for stage in stages],
    }


def write_chosen(file: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe as YAML that appears whole or not at all."""
    with appearing(file) as temporary:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        temporary.write_text(f"# What the stage shape chose: the same by hand.\n{text}", encoding="utf-8")
