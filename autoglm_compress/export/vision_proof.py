"""The proof of a vision tower's file: what llama.cpp gives the text model for an image, beside the checkpoint's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.plain_model import meta_model
from autoglm_compress.errors import UserError
from autoglm_compress.export import llama_cpp_vision
from autoglm_compress.export.engine_process import ask_engine
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.vision_families import FRAMES, MERGED, Pixels, within
from autoglm_compress.forward.features import tower_module

SIDE = 8
"""Tokens on each side of the image: enough that no engine enlarges it."""
MOST_ERROR = {"F32": 1e-5, "F16": 1e-3}
"""The most squared error of the features, relative to their squares; GELU is a table of fp16 in llama.cpp."""
FP32 = 4


@dataclass(frozen=True)
class VisionProof:
    """How near llama.cpp's features of an image are to the checkpoint's: the relative squared error over `tokens`."""

    error: float
    tokens: int

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return {"squared_error": float(f"{self.error:.4g}"), "tokens": self.tokens}


def vision_proof_memory(shape: ModelShape) -> int:
    """Bytes of all towers in fp32, and of the largest tensor as it is stored."""
    tensors = [tensor for tower in shape.kept for tensor in tower.tensors]
    return FP32 * sum(tensor.elements for tensor in tensors) + max(tensor.nbytes for tensor in tensors)


def prove_vision(job: ExportJob, text: Path, vision: Path, pixels: Pixels, kind: str) -> VisionProof:
    """Compare llama.cpp's features of an image of random pixels with those of the checkpoint's own tower.

    Args:
        job: what is exported.
        text: the text model's file.
        vision: the tower's file.
        pixels: what the processor does to pixels.
        kind: ggml's name of the type of the tower's matrices.

    Raises:
        EngineError: llama.cpp does not take the file.
        UserError: its features are others.
    """
    config = job.checkpoint.whole_config.vision_config
    side = SIDE * MERGED * config.patch_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    given, made = job.work / "pixels.npy", job.work / "features.npy"
    np.save(given, image)
    files = {"file": text, "vision": vision, "pixels": given, "features": made}
    question = {name: str(path) for name, path in files.items()} | {"threads": torch.get_num_threads()}
    ask_engine(llama_cpp_vision.__name__, question)
    found, expected = torch.from_numpy(np.load(made)), _features(job.checkpoint, _patches(image, pixels, config))
    for file in (given, made):
        file.unlink()
    if found.shape != expected.shape:
        raise UserError(
            f"{vision.name}: llama.cpp makes features {[*found.shape]} of an image, and the checkpoint "
            f"{[*expected.shape]}. The export is broken and was not kept: report it."
        )
    error = float((found - expected).double().square().sum() / expected.double().square().sum())
    if not error <= MOST_ERROR[kind]:
        raise UserError(
            f"{vision.name}: llama.cpp does not see by it what the checkpoint sees: {100 * error:.3g} % squared error "
            f"of an image's features (at most {100 * MOST_ERROR[kind]:g} % is allowed). The export is broken and was "
            "not kept: report it."
        )
    return VisionProof(error, len(found))


def _patches(image: np.ndarray, pixels: Pixels, config: Any) -> torch.Tensor:
    """An image as the processors of these families give it to the tower: patches [patches, numbers of each].

    Patches that become one token follow on each other. Of each the numbers run over colours, frames, rows and columns.
    """
    values = torch.from_numpy(image).float() / 255
    values = (values - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
    size, across = config.patch_size, len(image) // (config.patch_size * MERGED)
    squares = values.permute(2, 0, 1).view(3, across, MERGED, size, across, MERGED, size)
    patches = squares.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, size * size)
    return patches.expand(-1, -1, FRAMES, -1).flatten(1)


@torch.no_grad()
def _features(checkpoint: Checkpoint, patches: torch.Tensor) -> torch.Tensor:
    """What a checkpoint's tower gives the text model for an image: [tokens, width * (1 + layers that get features)]."""
    whole = checkpoint.whole_unquantized_config()
    prefix = within(checkpoint)
    kind: Any = type(tower_module(meta_model(whole, checkpoint.family.auto_class), prefix.removesuffix(".")))
    tower = kind._from_config(whole.vision_config, dtype=torch.float32)
    for part in checkpoint.shape.kept:
        for tensor in part.tensors:
            tower.get_parameter(tensor.name.removeprefix(prefix)).copy_(checkpoint.read(tensor.name))
    across = MERGED * SIDE
    seen = tower.eval()(patches, grid_thw=torch.tensor([[1, across, across]]))
    return torch.cat([seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())], dim=1)
