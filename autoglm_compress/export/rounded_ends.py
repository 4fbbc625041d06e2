"""What 8 bits for embedding and head cost, apart from what an engine rounds."""

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.runtime import Runtime
from autoglm_compress.slices import row_slices


class RoundedEnds(Checkpoint):
    """A checkpoint whose embedding and head, where they are plain numbers, read as ggml's Q8_0 holds them."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, rounded if it is one of them."""
        values = super().read(name)
        if name not in self.infos or name not in (self.family.embedding, self.family.head):
            return values
        rounded = torch.empty_like(values)
        for rows in row_slices(len(values)):
            rounded[rows] = _rounded(values[rows])
        return rounded


def _rounded(values: torch.Tensor) -> torch.Tensor:
    from gguf import GGMLQuantizationType, dequantize, quantize

    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(values.float().numpy(), kind), kind)).to(values.dtype)


def cost_of_rounding(checkpoint: Checkpoint, rows: torch.Tensor, runtime: Runtime) -> float:
    """The mean KL divergence in nats, over rows of token ids, from a checkpoint to the same with rounded ends."""
    return agreement(checkpoint, RoundedEnds(checkpoint.folder, checkpoint.family), [rows], runtime).divergence
