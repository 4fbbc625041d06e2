"""The vision towers that llama.cpp runs beside a text model, from a file of their own, which it calls `mmproj`.

`clip` is llama.cpp's name for all of them. Its names of tensors are those of the `gguf` package, but for what `renamed`
says. A patch is embedded by one convolution for each of the two frames that an image is shown as.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape, packed_linears
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.processor import FILE
from autoglm_compress.export.text_models import towers_left

PREFIX = "model.visual."
"""All kept towers of the families here stand within it."""
FRAMES, MERGED = 2, 2
"""The frames of an image, and the patches on each side of a square that becomes one token; llama.cpp has no others."""


@dataclass(frozen=True)
class VisionFamily:
    """How llama.cpp runs the vision tower of a family.

    `projector` is its name there, `activation` that of the config as llama.cpp computes it, `renamed` the beginnings of
    names, after PREFIX, that the `gguf` package has no names for.
    """

    projector: str
    activation: str
    renamed: Mapping[str, str] = field(default_factory=dict)


_GLM4V = VisionFamily("glm4v", "silu")
FAMILIES: Mapping[str, VisionFamily] = {
    "Glm4vForConditionalGeneration": _GLM4V,
    "Glm46VForConditionalGeneration": _GLM4V,
    "Qwen3VLForConditionalGeneration": VisionFamily(
        "qwen3vl_merger",
        "gelu_pytorch_tanh",
        {"merger.linear_fc1.": "mm.0.", "merger.linear_fc2.": "mm.2.", "merger.norm.": "v.post_ln."},
    ),
}
"""By architecture."""


@dataclass(frozen=True)
class Pixels:
    """What a processor subtracts from the three colours of a pixel between 0 and 1, and divides them by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def pixels_of(folder: Path) -> Pixels | None:
    """What a checkpoint's processor does to pixels; None if no file says so."""
    for name in (FILE, "processor_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        found |= found.get("image_processor") or {}
        if "image_mean" in found and "image_std" in found:
            return Pixels(tuple(found["image_mean"]), tuple(found["image_std"]))
    return None


def left_behind(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint's towers do not go along, in words; None if they do, or there are none."""
    if not checkpoint.family.kept:
        return None
    reason = _problem(checkpoint.shape, checkpoint.whole_config)
    if reason is None and pixels_of(checkpoint.folder) is None:
        reason = f"no {FILE} says what is done to pixels"
    return None if reason is None else f"{towers_left(checkpoint.shape)}: {reason}"


def _problem(shape: ModelShape, config: Any) -> str | None:
    known = FAMILIES.get(shape.family.architecture)
    if known is None:
        return "llama.cpp is not known to run them as transformers does"
    vision = config.vision_config
    if packed_linears(shape.kept):
        return "their linears are in 8 bits, which llama.cpp does not take by channels"
    if vision.hidden_act != known.activation:
        return f"hidden_act {vision.hidden_act} of the vision tower: llama.cpp has {known.activation} there"
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (FRAMES, MERGED):
        return f"llama.cpp takes patches of {FRAMES} frames, {MERGED} x {MERGED} of which are a token"
    return None


def could_go_along(shape: ModelShape) -> bool:
    """Whether the towers of a model of this shape may go along, as far as the shape tells."""
    return shape.family.architecture in FAMILIES and not packed_linears(shape.kept)


def trained_side(config: Any) -> int:
    """The pixels on each side of the image whose patches have positions of their own."""
    given = getattr(config, "image_size", None)
    return given or int(config.num_position_embeddings**0.5) * config.patch_size


def engine_name(name: str, config: Any, known: VisionFamily, names: Any) -> str | None:
    """llama.cpp's name for a tensor of a vision tower; None if it has none.

    Args:
        name: the tensor's full name.
        config: the tower's.
        known: the family.
        names: the `gguf` package's names.
    """
    within = name.removeprefix(PREFIX)
    if within.startswith("deepstack_merger_list."):
        _, number, rest = within.split(".", 2)
        return f"v.deepstack.{config.deepstack_visual_indexes[int(number)]}.{rest.removeprefix('linear_')}"
    for ours, theirs in known.renamed.items():
        if within.startswith(ours):
            return theirs + within.removeprefix(ours)
    found: str | None = names.get_name(f"visual.{within}", try_suffixes=(".weight", ".bias"))
    return found
