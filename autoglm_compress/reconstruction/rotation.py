"""Turning the residual stream to another basis and keeping the directions that carry most (after SliceGPT).

Unlike SliceGPT (Ashkboos et al. 2024), which turns every layer to a basis of its own and multiplies the residual stream
between them, one basis serves the whole model, so the result is a plain architecture. RMS norms commute with a
rotation once their gains are in the linears that read them; what is left of a gain is one number for all channels.
"""

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.reconstruction.surgery import row_slices


def principal_directions(gram: torch.Tensor, count: int) -> torch.Tensor:
    """The eigenvectors [size, count] of a Gram matrix [size, size] with the largest eigenvalues, each with one sign."""
    _, vectors = torch.linalg.eigh(gram.double())
    leading = vectors.flip(1)[:, :count]
    largest = leading.abs().argmax(0)
    return (leading * leading[largest, torch.arange(count)].sign()).float()


class Rotation:
    """Rewrites the tensors of a checkpoint for a residual stream in another basis.

    Args:
        source: the checkpoint; its embeddings must not be tied, since the final norm's gain moves into the head.
        basis: orthonormal columns [hidden_size, kept].
        gains: the number each norm's gain becomes, by the name of its tensor.
    """

    def __init__(self, source: Checkpoint, basis: torch.Tensor, gains: dict[str, float]) -> None:
        self.source = source
        self.family = source.family
        self.basis = basis
        self.gains = gains

    def change(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the source, by its full name, in the new basis."""
        if name in self.gains:
            return torch.full((self.basis.shape[1],), self.gains[name], dtype=tensor.dtype)
        axes = self.family.axes_of(name)
        if "hidden" not in axes:
            return tensor
        if axes[-1] != "hidden" or tensor.dim() == 1:
            return (self.basis.T @ tensor.float()).to(tensor.dtype)  # what writers add to the residual stream
        norm = self._norm_before(name)
        gain = 1.0 if norm is None else self.source.read(norm).float()
        turned = tensor.new_empty(len(tensor), self.basis.shape[1])
        for rows in row_slices(len(tensor)):
            turned[rows] = ((tensor[rows].float() * gain) @ self.basis).to(tensor.dtype)
        return turned

    def _norm_before(self, name: str) -> str | None:
        """The norm whose output a tensor multiplies."""
        if name == self.family.head:
            return self.family.final_norm
        if name in self.family.model_tensors:
            return None
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        for norm, readers in self.family.norm_readers.items():
            if rest in [f"{reader}.weight" for reader in readers]:
                return f"{self.family.layer_prefix(int(layer))}{norm}.weight"
        return None
