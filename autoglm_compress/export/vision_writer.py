"""Writing a vision tower as llama.cpp reads it, tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.export.exactness import Exactness
from autoglm_compress.export.gguf_tensors import StoredTensor, plain_matrix
from autoglm_compress.export.gguf_writer import FILE_TYPES, write_tensors
from autoglm_compress.export.vision_families import (
    FAMILIES,
    FRAMES,
    FUSED,
    NUMBERED,
    PARTS,
    Pixels,
    engine_name,
    full_attention_every,
    trained_side,
    within,
)
from autoglm_compress.progress import Progress

PATCHES = "patch_embed.proj.weight"
POSITIONS = "v.position_embd.weight"


@dataclass(frozen=True)
class VisionTensor(StoredTensor):
    """A tensor of the file; of the one that embeds patches, that of one frame."""

    frame: int | None = None


def matrix_type(shape: ModelShape) -> str:
    """ggml's name of the type of a tower's matrices."""
    return "F32" if shape.dtype == "float32" else "F16"


def vision_bytes(shape: ModelShape) -> int:
    """Bytes of the tensors of a file with all towers, vectors and positions as if they were matrices."""
    size = 4 if matrix_type(shape) == "F32" else 2
    return size * sum(tower.parameters for tower in shape.kept)


def write_vision(
    checkpoint: Checkpoint, pixels: Pixels, file: Path, name: str, exactness: Exactness, progress: Progress
) -> None:
    """Write a checkpoint's vision tower as a GGUF file, which appears under its name when it is complete.

    Args:
        checkpoint: whose towers can go along.
        pixels: what its processor does to pixels.
        file: where to.
        name: what the file calls the model.
        exactness: counts what is rounded.
        progress: where it is shown.
    """
    import gguf

    config = checkpoint.whole_config.vision_config
    kind = matrix_type(checkpoint.shape)
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES[kind]]))
    _add_sizes(writer, checkpoint, config)
    writer.add_vision_image_mean(list(pixels.mean))
    writer.add_vision_image_std(list(pixels.std))
    tensors = list(_tensors(checkpoint, config, kind))
    write_tensors(writer, file, tensors, lambda tensor: _values(checkpoint, tensor, exactness), progress)


def _add_sizes(writer: Any, checkpoint: Checkpoint, config: Any) -> None:
    family = FAMILIES[checkpoint.family.architecture]
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(family.projector)
    writer.add_vision_projection_dim(checkpoint.shape.hidden_size)
    writer.add_vision_image_size(trained_side(config))
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.depth)
    writer.add_vision_head_count(config.num_heads)
    writer.add_vision_spatial_merge_size(config.spatial_merge_size)
    # Towers with LayerNorms have the epsilon in their code.
    writer.add_vision_attention_layernorm_eps(getattr(config, "rms_norm_eps", 1e-6))
    if family.activation == "silu":
        writer.add_vision_use_silu(True)
    else:
        writer.add_vision_use_gelu(True)
    if family.windows:
        writer.add_vision_n_wa_pattern(full_attention_every(config))
    if checkpoint.shape.first_layers:
        writer.add_vision_is_deepstack_layers(
            [layer in config.deepstack_visual_indexes for layer in range(config.depth)]
        )


def _tensors(checkpoint: Checkpoint, config: Any, kind: str) -> Iterator[VisionTensor]:
    import gguf

    family = FAMILIES[checkpoint.family.architecture]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(config.depth, NUMBERED))

    def named(ours: str) -> str:
        found = engine_name(ours, config, family, names)
        if found is None:
            raise UserError(f"{checkpoint.folder}: tensor {ours} of the vision tower: llama.cpp has no name for it.")
        return found

    for tensor in (tensor for tower in checkpoint.shape.kept for tensor in tower.tensors):
        ours = tensor.name.removeprefix(within(checkpoint))
        if ours == PATCHES:
            shape, found = (*tensor.shape[:2], *tensor.shape[3:]), named(ours)
            for frame in range(FRAMES):
                yield VisionTensor(tensor.name, found + (f".{frame}" if frame else ""), shape, kind, frame=frame)
            continue
        # llama.cpp interpolates positions, and adds and multiplies vectors, in fp32 alone.
        vector = len(tensor.shape) == 1
        if family.splits and FUSED in ours:
            rows = tensor.shape[0] // len(PARTS)
            for number, part in enumerate(PARTS):
                found, shape = named(ours.replace(PARTS, part)), (rows, *tensor.shape[1:])
                yield VisionTensor(tensor.name, found, shape, "F32" if vector else kind, number * rows)
        else:
            found = named(ours)
            yield VisionTensor(tensor.name, found, tensor.shape, "F32" if vector or found == POSITIONS else kind)


def _values(checkpoint: Checkpoint, tensor: VisionTensor, exactness: Exactness) -> np.ndarray:
    values: torch.Tensor = checkpoint.read(tensor.name)[tensor.rows]
    if tensor.frame is not None:
        values = values[:, :, tensor.frame]
    if values.dim() == 1:
        return values.float().numpy()
    return plain_matrix(tensor, values.flatten(1), None, exactness)
