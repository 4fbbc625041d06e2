"""What 8 bits for embedding and head cost, apart from what an engine rounds."""

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.export.eight_bits import rounded_to_eight_bits
from autoglm_compress.runtime import Runtime
from autoglm_compress.slices import row_slices


class RoundedEnds(Checkpoint):
    """A checkpoint whose embedding and head, where they are plain numbers, read as blocks of 8 bits hold them."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, rounded if it is one of them."""
        values = super().read(name)
        if name not in self.infos or name not in (self.family.embedding, self.family.head):
            return values
        rounded = torch.empty_like(values)
        for rows in row_slices(len(values)):
            rounded[rows] = rounded_to_eight_bits(values[rows])
        return rounded


def cost_of_rounding(checkpoint: Checkpoint, rows: torch.Tensor, runtime: Runtime) -> float:
    """The mean KL divergence in nats, over rows of token ids, from a checkpoint to the same with rounded ends."""
    return agreement(checkpoint, RoundedEnds(checkpoint.folder, checkpoint.family), [rows], runtime).divergence
