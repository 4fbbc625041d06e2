"""A checkpoint whose integers are multiplied out in fp32, as engines compute with them."""

import torch

from autoglm_compress.checkpoint import Checkpoint


class ExactCheckpoint(Checkpoint):
    """A checkpoint that reads quantized weights in fp32, without rounding them to its own dtype."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        if name in self.infos:
            return super().read(name)
        integers, scales, zeros = self.read_integers(name.removesuffix(".weight"))
        grouped = integers.float().unflatten(1, (scales.shape[1], -1))
        if zeros is not None:
            grouped -= zeros.float().unsqueeze(-1)
        return grouped.mul_(scales.float().unsqueeze(-1)).flatten(1)
