"""The models that `true_size.py` runs recipes on: their shapes, and what is changed for small machines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from chains import ROOT
from random_models import article_config
from transformers import AutoConfig, PreTrainedConfig

LENGTH = 128
PERPLEXITY = {"samples": 2, "sequence_length": LENGTH}
CHANGES = [
    "source: random weights, with the embedded model's tokenizer",
    "calibration: fewer and shorter rows of the same two files",
    "evaluation: perplexity on 256 tokens; no MMLU, which random weights answer by chance",
    "heal: left out",
    "keep: none, so that the checkpoints before the last two go when they have served",
]
"""Of every recipe."""


@dataclass(frozen=True)
class Source:
    """A model and its recipe.

    `config` is the model's with so many layers, `changes` say what `options`, by the names of stages, change.
    """

    recipe: str
    layers: int
    config: Callable[[int], PreTrainedConfig]
    options: dict[str, dict[str, Any]]
    changes: list[str] = field(default_factory=list)


def _article(layers: int) -> PreTrainedConfig:
    return article_config(layers, key_value_heads=32)


def _glm4v(layers: int) -> PreTrainedConfig:
    """GLM-4.1V-9B's, with its whole vision tower."""
    config = AutoConfig.from_pretrained(ROOT / "tests" / "configs" / "glm-4.1v-9b")
    config.text_config.num_hidden_layers = layers
    return config


SOURCES = {
    "glm": Source(
        "phone9b",
        36,
        _article,
        {
            "depth": {"num_hidden_layers": "0.6667x"},
            "heads": {"kv_heads": 24},
            "refit": {"layer_passes": 0, "logit_passes": 0},
            "int8": {"method": "round_to_nearest"},
        },
        [
            "heads: kv_heads 24 too, since with 32 KV heads each group has one query head",
            "refit: layer_passes 0 and logit_passes 0, as its comment says for CPUs",
            "int8: round_to_nearest",
        ],
    ),
    "glm4v": Source(
        "autoglm-phone-4b",
        5,
        _glm4v,
        {"depth": {"num_hidden_layers": "0.6x"}, "refit": {"layer_passes": 1, "logit_passes": 1}},
        ["refit: one pass of each kind"],
    ),
}
"""By the model's family."""


def write_recipe(folder: Path, source: Source, model: Path, rows: int) -> Path:
    """A source's recipe with what is changed."""
    file = ROOT / "recipes" / f"{source.recipe}.yaml"
    stages = [stage for stage in yaml.safe_load(file.read_text())["stages"] if stage["stage"] != "heal"]
    for stage in stages:
        stage |= source.options.get(stage.get("name", stage["stage"]), {})
        if stage["stage"] == "evaluate":
            stage["tasks"] = ["perplexity"]
        if stage.get("from") == "heal":
            stage["from"] = "refit"
    recipe = {
        "base": str(file),
        "model": {"source": str(model.resolve())},
        "calibration": {"samples": rows, "sequence_length": LENGTH},
        "evaluation": {"perplexity": PERPLEXITY},
        "keep": "none",
        "stages": stages,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"
