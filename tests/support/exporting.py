"""Exports of tiny models, and what is in their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoglm_compress.checkpoint import Checkpoint
from support.running import run, write_recipe

QUANTIZED: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "int8": {"bits": 8, "group_size": 64},
    "zeros": {"bits": 4, "group_size": 32, "symmetric": False},
    "awq": {"bits": 4, "group_size": 64, "format": "awq"},
}
"""The ways to quantize, by the names that stages have in recipes here."""
COMMON_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "as wide inside as outside": ("glm", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "no biases": ("glm4", {"attention_bias": False}),
    "a quarter rotary": (
        "glm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.25}},
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "fp32": ("glm", {"dtype": "float32"}),
}
"""What sets models apart, by a family and the changes to its config."""
TEXT = {"samples": 2, "sequence_length": 128}


def quantize(name: str, **options: Any) -> dict[str, Any]:
    """A stage that quantizes the source without looking at activations, whatever it does to the predictions."""
    common = {"stage": "quantize", "name": name, "from": "source", "method": "round_to_nearest"}
    return common | {"max_divergence": 100.0} | QUANTIZED.get(name, {}) | options


def export(checkpoint: str, **options: Any) -> dict[str, Any]:
    """A stage that exports to GGUF, called after the checkpoint it takes."""
    return {"stage": "export", "name": f"{checkpoint}-gguf", "from": checkpoint, "format": "gguf"} | options


def recipe_of(folder: Path, source: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """A recipe that evaluates nothing."""
    settings = {"evaluation": {"every_stage": []}, "calibration": {"source": "python-docs"} | TEXT}
    return write_recipe(folder, source, stages, **(settings | changes))


def run_stages(folder: Path, source: Path, *stages: dict[str, Any], **changes: Any) -> str:
    """Run such a recipe into `out` in the folder; what the user saw."""
    return run(recipe_of(folder, source, *stages, **changes))


def stage_folder(output: Path, name: str) -> Path:
    """The folder of a stage by its name."""
    return next(output.glob(f"[0-9][0-9]-{name}"))


def record(folder: Path) -> dict[str, Any]:
    """What a stage decided."""
    return json.loads((folder / "stage.json").read_text())["decisions"]


def stored(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of the one GGUF file in a folder as the `gguf` package reads them: type, and values in fp32."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(folder.glob("*.gguf")))
    return {
        tensor.name: (tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]))
        for tensor in reader.tensors
    }


def metadata(folder: Path) -> dict[str, Any]:
    """What the one GGUF file in a folder says beside its tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(next(folder.glob("*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items()}


def exact_weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """Integers times scales in fp64 [out, in], with the scales and minima of zero points as fp16 holds them."""
    integers, scales, zeros = (None if part is None else part.double() for part in checkpoint.read_integers(module))
    grouped, scales = integers.unflatten(1, (scales.shape[1], -1)), scales.unsqueeze(-1)
    if zeros is None:
        return (grouped * scales.half().double()).flatten(1)
    minima = (-scales * (zeros.unsqueeze(-1) + 8)).half().double()
    return ((grouped + 8) * scales.half().double() + minima).flatten(1)


def in_engine_order(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of queries or keys [heads * head_dim, …] in the order of llama.cpp's `llama`, one row at a time."""
    half, found = head_dim // 2, torch.empty_like(weight)
    for row in range(len(weight)):
        head, channel = divmod(row, head_dim)
        place = 2 * channel if channel < half else 2 * (channel - half) + 1
        found[head * head_dim + place] = weight[row]
    return found
