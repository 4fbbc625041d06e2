"""Narrow the residual stream."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.reconstruction.importance import random_scores, top
from autoglm_compress.reconstruction.rotation import Rotation, principal_directions
from autoglm_compress.reconstruction.surgery import Cut, Rewrite
from autoglm_compress.stages.base import PlanError, Size, Stage, StageContext, resolve_size


class Width(Stage):
    """Keep the directions or the channels of the residual stream that carry most, the same ones in every layer.

    `pca` turns the residual stream to the principal directions of its normalised states and keeps the first ones; it
    needs norms that linears alone read and untied embeddings. The others keep channels as they are: `activation` by
    Minitron's score (Muralidharan et al. 2024), the mean absolute output of a channel summed over all norms;
    `magnitude` by the norm of a channel's column of the embedding. Left out, `method` is `pca` where it can be, else
    `activation`. A norm that now runs over fewer channels divides by another root mean square, so each gain is
    multiplied by the ratio that calibration shows.
    """

    stage: Literal["width"]
    hidden_size: Size
    method: Literal["pca", "activation", "magnitude", "random"] | None = None

    @property
    def uses_calibration(self) -> bool:
        """Always: norms are rescaled by what calibration shows."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with a narrower residual stream."""
        keep = resolve_size(self.hidden_size, shape.hidden_size)
        if not 1 <= keep <= shape.hidden_size:
            raise PlanError("hidden_size", f"{keep}: expected 1 to {shape.hidden_size}, the source's hidden_size")
        if keep % 8:
            below = keep // 8 * 8
            raise PlanError("hidden_size", f"{keep}: kernels need a multiple of 8: use {below} or {below + 8}")
        if self.method == "pca" and not _can_rotate(shape):
            reason = "its embeddings are tied" if shape.tie_word_embeddings else "norms stand behind its writers"
            raise PlanError("method", f"pca cannot turn this model's residual stream, as {reason}: use activation")
        return replace(shape, hidden_size=keep)

    def run(self, context: StageContext) -> None:
        """Choose what to keep and write a checkpoint without the rest."""
        method = self.method or ("pca" if _can_rotate(context.source.shape) else "activation")
        if context.shape.hidden_size == context.source.shape.hidden_size:
            self._write(context, {})
            context.decisions = {"method": "nothing to remove"}
        elif method == "pca":
            self._rotate(context)
        else:
            self._select(context, method)

    def _write(self, context: StageContext, cut: Cut, **change: Any) -> None:
        layers = range(context.source.shape.num_hidden_layers)
        rewrite = Rewrite(layers, cut, lambda _: cut, **change)
        rewrite.run(context.source, context.target, context.shape, context.progress)

    def _rotate(self, context: StageContext) -> None:
        total = sum(gram for _, gram in _residual_grams(context))
        basis = principal_directions(total, context.shape.hidden_size)
        # Two passes over the statistics, so that one layer's Gram matrix is in memory and not all of them.
        gains = {
            name: float(_energy(basis, gram) / basis.shape[1] / gram.diagonal().mean()) ** 0.5
            for name, gram in _residual_grams(context)
        }
        self._write(context, {}, change=Rotation(context.source, basis, gains).change)
        context.lineage = context.lineage.keep_directions(basis, context.origin.shape.hidden_size)
        share = float(_energy(basis, total) / total.trace())
        context.decisions = {"method": "pca", "share_of_energy": share, "gains": gains}

    def _select(self, context: StageContext, method: str) -> None:
        kept = top(_channel_scores(context, method), context.shape.hidden_size)
        gains = {
            name: float((square[list(kept)].mean() / square.mean()).sqrt())
            for name, _, square in _norm_moments(context)
        }

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.float() * gains[name]).to(tensor.dtype) if name in gains else tensor

        self._write(context, {"hidden": torch.tensor(kept)}, change=change)
        context.lineage = context.lineage.keep_channels(kept)
        context.decisions = {"method": method, "kept_channels": list(kept), "gains": gains}


def _can_rotate(shape: ModelShape) -> bool:
    return not shape.tie_word_embeddings and not shape.family.writer_norms


def _energy(basis: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The trace of a Gram matrix [size, size] within the span of orthonormal columns [size, kept]."""
    return ((basis.T @ gram) * basis.T).sum()


def _residual_grams(context: StageContext) -> Iterator[tuple[str, torch.Tensor]]:
    """For the norms that linears read, by tensor name, the Gram matrix of normalised states in the present basis."""
    statistics, family, lineage = context.statistics(), context.source.family, context.lineage
    for layer, origin in enumerate(lineage.layers):
        gram = lineage.project_gram(statistics.layer(origin)["residual_gram"])
        for norm in family.norm_readers:
            yield f"{family.layer_prefix(layer)}{norm}.weight", gram
    yield family.final_norm, lineage.project_gram(statistics.final()["residual_gram"])


def _norm_moments(context: StageContext) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each norm's tensor name and its two moments [hidden_size] over the channels present."""
    statistics, family = context.statistics(), context.source.family
    if context.lineage.basis is not None:
        # In a turned basis only second moments are known; models that can be turned have no norms but those.
        squares = {name: gram.diagonal() for name, gram in _residual_grams(context)}
        return [(name, square.sqrt(), square) for name, square in squares.items()]
    channels = list(context.lineage.channels)
    norms = []
    for layer, origin in enumerate(context.lineage.layers):
        moments, prefix = statistics.layer(origin), family.layer_prefix(layer)
        norms += [
            (f"{prefix}{norm}.weight", moments[f"{norm}.mean_abs"], moments[f"{norm}.mean_square"])
            for norm in family.hidden_norms
        ]
    final = statistics.final()
    norms.append((family.final_norm, final["mean_abs"], final["mean_square"]))
    return [(name, absolute[channels], square[channels]) for name, absolute, square in norms]


def _channel_scores(context: StageContext, method: str) -> torch.Tensor:
    """Scores [hidden_size] of the channels present."""
    if method == "random":
        return random_scores(context.source.shape.hidden_size, context.seed, 0)
    if method == "magnitude":
        return context.source.read(context.source.family.embedding).float().norm(dim=0)
    behind_writers = tuple(f"{norm}.weight" for norm in context.source.family.writer_norms.values())
    return sum(
        absolute * context.source.read(name).float().abs()
        for name, absolute, _ in _norm_moments(context)
        if not (behind_writers and name.endswith(behind_writers))
    )
