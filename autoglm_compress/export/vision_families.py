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

FRAMES, MERGED = 2, 2
"""The frames of an image, and the patches on each side of a square that becomes one token; llama.cpp has no others."""
USUAL_PLACES = 40**2
"""Patches of the image that llama.cpp is told of where a tower has no positions of its own."""
WINDOW = 112
"""Pixels on each side of a window of attention; llama.cpp has no others."""
NUMBERED = 3
"""Linears after the layers are numbered by llama.cpp as they are in the checkpoint, with numbers below this one."""
FUSED, PARTS = ".attn.qkv.", "qkv"
"""Queries, keys and values in one linear, and what each is called apart."""


@dataclass(frozen=True)
class VisionFamily:
    """How llama.cpp runs the vision tower of a family.

    `projector` is its name there, `activation` that of the config as llama.cpp computes it, `renamed` the beginnings of
    names within the tower that the `gguf` package has no names for. `splits` says that queries, keys and values, fused
    in the checkpoint, are three linears, `windows` that most layers attend within windows.
    """

    projector: str
    activation: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    splits: bool = False
    windows: bool = False


_GLM4V = VisionFamily("glm4v", "silu")
FAMILIES: Mapping[str, VisionFamily] = {
    "Glm4vForConditionalGeneration": _GLM4V,
    "Glm46VForConditionalGeneration": _GLM4V,
    "Qwen3VLForConditionalGeneration": VisionFamily(
        "qwen3vl_merger",
        "gelu_pytorch_tanh",
        {"merger.linear_fc1.": "mm.0.", "merger.linear_fc2.": "mm.2.", "merger.norm.": "v.post_ln."},
    ),
    "Qwen2_5_VLForConditionalGeneration": VisionFamily("qwen2.5vl_merger", "silu", splits=True, windows=True),
}
"""By architecture."""
OTHERWISE: Mapping[str, str] = {
    "VoxtralForConditionalGeneration": "llama.cpp averages the states of its tower two by two",
    "Qwen2AudioForConditionalGeneration": "llama.cpp fills sounds with silence up to 30 seconds",
}
"""Why the towers of other architectures that llama.cpp has a name for are not run as `transformers` runs them."""


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
        return OTHERWISE.get(shape.family.architecture, "llama.cpp is not known to run them as transformers does")
    vision = config.vision_config
    if packed_linears(shape.kept):
        return "their linears are in 8 bits, which llama.cpp does not take by channels"
    if vision.hidden_act != known.activation:
        return f"hidden_act {vision.hidden_act} of the vision tower: llama.cpp has {known.activation} there"
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (FRAMES, MERGED):
        return f"llama.cpp takes patches of {FRAMES} frames, {MERGED} x {MERGED} of which are a token"
    if known.windows and (vision.window_size != WINDOW or full_attention_every(vision) is None):
        return (
            f"llama.cpp has windows of {WINDOW} pixels, and attention to all of an image in one layer of so many, and "
            f"here window_size is {vision.window_size}, fullatt_block_indexes {vision.fullatt_block_indexes}"
        )
    return None


def full_attention_every(config: Any) -> int | None:
    """The number n where the last of each n layers of a tower attends to all of an image; None if it is not so."""
    full = list(config.fullatt_block_indexes)
    every = full[0] + 1 if full else 0
    return every if every and full == list(range(every - 1, config.depth, every)) else None


def within(checkpoint: Checkpoint) -> str:
    """The prefix of the vision tower's names, within which its merger stands too."""
    return checkpoint.family.kept["vision"]


def could_go_along(shape: ModelShape) -> bool:
    """Whether the towers of a model of this shape may go along, as far as the shape tells."""
    return shape.family.architecture in FAMILIES and not packed_linears(shape.kept)


def trained_side(config: Any) -> int:
    """The pixels on each side of the image whose patches have positions of their own, or of a usual one."""
    given = getattr(config, "image_size", None)
    places = getattr(config, "num_position_embeddings", USUAL_PLACES)
    return given or int(places**0.5) * config.patch_size


def engine_name(name: str, config: Any, known: VisionFamily, names: Any) -> str | None:
    """llama.cpp's name for a tensor of a vision tower; None if it has none.

    Args:
        name: the tensor's name within the tower.
        config: the tower's.
        known: the family.
        names: the `gguf` package's names.
    """
    if name.startswith("deepstack_merger_list."):
        _, number, rest = name.split(".", 2)
        return f"v.deepstack.{config.deepstack_visual_indexes[int(number)]}.{rest.removeprefix('linear_')}"
    for ours, theirs in known.renamed.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    found: str | None = names.get_name(f"visual.{name}", try_suffixes=(".weight", ".bias"))
    return found
