"""Rotating the residual stream and keeping the directions that matter most (after SliceGPT).

Unlike SliceGPT (Ashkboos et al. 2024), which turns every layer to a basis of its own and multiplies the residual stream
between them, one basis serves the whole model, so the result is a plain architecture. RMS norms commute with a
rotation once their gains are in the linears that read them; what is left of a gain is one number for all channels.

Two matrices [hidden_size, hidden_size] decide what matters: the Gram matrix G of the normalised states x, and the
metric M, the mean of W^T W over the readers W. e^T M e is the readers' squared error for an error e of x.
"""

from dataclasses import replace

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.tying import tying_memory
from autoglm_compress.slices import SLICE_ROWS, row_slices

DAMPING = 1e-5
"""Added to a Gram matrix, relative to its mean diagonal, where it has to have an inverse."""


def gram_memory(shape: ModelShape) -> int:
    """Bytes of the Gram matrices, bases and factors that a choice of directions or channels holds, in fp64.

    At the second eigenvectors of `reader_directions`: G, the first ones, the root, what is decomposed, the result,
    LAPACK's two, and G and M in fp32. Before, readers are squared a slice of rows at a time: as they are, less their
    mean, and times the gain.
    """
    size = shape.hidden_size
    slices = 3 * 4 * min(SLICE_ROWS, shape.vocab_size) * size + 3 * 4 * size**2
    head = shape.element_bytes * shape.vocab_size * size
    return max(8 * 8 * size**2, head + slices)


def turning_memory(shape: ModelShape, kept: int) -> int:
    """Bytes of a head while it is turned to so many directions: as it was, turned, and a slice of rows in fp32.

    A tied one is turned twice, to an embedding and a head, which `tying_memory` has as they are tied again, beside the
    one there was.
    """
    head = shape.element_bytes * shape.vocab_size
    slices = 4 * min(SLICE_ROWS, shape.vocab_size) * (shape.hidden_size + kept) + 4 * shape.hidden_size * kept
    if not shape.tie_word_embeddings:
        return head * (shape.hidden_size + kept) + slices
    # The embedding's turn takes all of it at once, in fp32.
    embedding = head * (shape.hidden_size + kept) + 4 * shape.vocab_size * (shape.hidden_size + kept)
    tying = head * shape.hidden_size + tying_memory(replace(shape, hidden_size=kept))
    return max(embedding, head * (shape.hidden_size + 2 * kept) + slices, tying)


def principal_directions(gram: torch.Tensor, count: int) -> torch.Tensor:
    """The eigenvectors [size, count] of a Gram matrix [size, size] with the largest eigenvalues, each with one sign."""
    _, vectors = torch.linalg.eigh(gram.double())
    leading = vectors.flip(1)[:, :count]
    largest = leading.abs().argmax(0)
    return (leading * leading[largest, torch.arange(count)].sign()).float()


def reader_directions(gram: torch.Tensor, metric: torch.Tensor, count: int) -> torch.Tensor:
    """An orthonormal basis [size, count] of the directions from which the readers' outputs are best predicted.

    Reduced-rank regression: of all maps of x to `count` numbers, A^T x loses the readers least when A spans M^(1/2) U,
    U being the leading eigenvectors of M^(1/2) G M^(1/2). Principal components (M = I) keep what is large in x, whether
    it is read or not. Parts of A along directions in which x hardly varies predict nothing and are removed.

    Args:
        gram: G, mean of x x^T over tokens.
        metric: M, mean of W^T W over readers.
        count: how many directions to keep.
    """
    gram, root = gram.double(), _root(metric)
    leading = torch.linalg.eigh(root @ gram @ root).eigenvectors.flip(1)[:, :count]
    basis, triangle = torch.linalg.qr(gram @ torch.linalg.solve(_damped(gram), root @ leading))
    return (basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)).float()


def reader_shares(gram: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """The share of the readers' squared outputs that each of the `reader_directions` adds [size], fp64, descending."""
    root = _root(metric)
    values = torch.linalg.eigvalsh(root @ gram.double() @ root).flip(0).clamp_min(0)
    return values / values.sum().clamp_min(1e-30)


def _root(metric: torch.Tensor) -> torch.Tensor:
    """The symmetric root of a metric [size, size], fp64."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def reconstruction(gram: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The matrix B [size, count] for which B Q^T x is closest to x, given a basis Q [size, count]."""
    gram, basis = gram.double(), basis.double()
    inner = _damped(basis.T @ gram @ basis)
    return torch.linalg.solve(inner, (_damped(gram) @ basis).T).T.float()


def _damped(gram: torch.Tensor) -> torch.Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


class Rotation:
    """Rewrites the tensors of a checkpoint for a residual stream in another basis.

    Args:
        source: the checkpoint. The final norm's gain moves into its head; tied embeddings get theirs from the caller.
        basis: orthonormal columns [hidden_size, kept].
        reading: [hidden_size, kept], reconstructs the input of a linear from the kept directions: the basis itself, or
            its `reconstruction`.
        gains: the number each norm's gain becomes, by the name of its tensor.
    """

    def __init__(self, source: Checkpoint, basis: torch.Tensor, reading: torch.Tensor, gains: dict[str, float]) -> None:
        self.source = source
        self.family = source.family
        self.basis = basis
        self.reading = reading
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
        right = self.basis if norm is None else self.source.read(norm).float()[:, None] * self.reading
        turned = tensor.new_empty(len(tensor), self.basis.shape[1])
        for rows in row_slices(len(tensor)):
            turned[rows] = (tensor[rows].float() @ right).to(tensor.dtype)
        return turned

    def _norm_before(self, name: str) -> str | None:
        """The norm whose output a tensor multiplies."""
        if name == self.family.head:
            return self.family.final_norm
        place = self.family.place(name)
        if place.layer is None:
            return None
        for norm, readers in self.family.norm_readers.items():
            if place.name in [f"{reader}.weight" for reader in readers]:
                return f"{self.family.layer_prefix(place.layer)}{norm}.weight"
        return None
