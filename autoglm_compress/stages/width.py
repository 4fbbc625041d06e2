"""Narrow the residual stream."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.cutting.importance import choose_channels, random_scores, top
from autoglm_compress.cutting.rotation import (
    Rotation,
    gram_memory,
    principal_directions,
    reader_directions,
    reconstruction,
)
from autoglm_compress.cutting.surgery import Cut, Rewrite
from autoglm_compress.cutting.tying import OUTPUT_WEIGHT, pair_moments, retying_memory, tie_least_squares
from autoglm_compress.errors import PlanError
from autoglm_compress.slices import row_slices
from autoglm_compress.stages.base import Size, Stage, StageContext, require_alike_layers, resolve_size
from autoglm_compress.stages.needs import Needs

TURNING = ("readers", "pca")
GAIN = "gain of "


class Width(Stage):
    """Keep the directions or the channels of the residual stream that matter most, the same ones in every layer.

    `readers` and `pca` turn the residual stream to another basis, which needs norms that linears alone read: `readers`
    keeps the directions from which the outputs of all linears that read the stream are best predicted, `pca` the
    principal directions of the normalised states, as SliceGPT (Ashkboos et al. 2024) does per layer. The others keep
    channels as they are: `least_squares` those from which the readers' outputs are best predicted (optimal brain
    surgery, one after the other); `activation` by Minitron's score (Muralidharan et al. 2024), the mean absolute output
    of a channel summed over all norms; `magnitude` by the norm of a channel's column of the embedding. Left out,
    `method` is `readers` where the stream can be turned, else `least_squares`. A norm that now runs over fewer channels
    divides by another root mean square, so each gain is multiplied by the ratio that calibration shows.

    Turning a stream moves the final norm's gain into the head. Where the head is the embedding, the two that this would
    make are tied again as the stage `tie` does.
    """

    stage: Literal["width"]
    hidden_size: Size
    method: Literal["readers", "pca", "least_squares", "activation", "magnitude", "random"] | None = None

    revision: ClassVar[int] = 2

    @property
    def uses_calibration(self) -> bool:
        """Always: norms are rescaled by what calibration shows."""
        return True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with a narrower residual stream."""
        require_alike_layers(shape, self.stage)
        if shape.family.kept:
            towers = ", ".join(shape.family.kept)
            raise PlanError("stage", f"what is kept as it is ({towers}) gives states as wide as they are now")
        keep = resolve_size(self.hidden_size, shape.hidden_size)
        if not 1 <= keep <= shape.hidden_size:
            raise PlanError("hidden_size", f"{keep}: expected 1 to {shape.hidden_size}, the source's hidden_size")
        if keep % 8:
            below = keep // 8 * 8
            raise PlanError("hidden_size", f"{keep}: kernels need a multiple of 8: use {below} or {below + 8}")
        if self.method in TURNING and shape.family.writer_norms:
            message = "cannot turn this model's residual stream, as norms stand behind its writers: use least_squares"
            raise PlanError("method", f"{self.method} {message}")
        return replace(shape, hidden_size=keep)

    def needs(self, shape: ModelShape, source: ModelShape, tokens: int) -> Needs:
        """A few Gram matrices, and what tying again takes."""
        return Needs(memory=gram_memory(shape) + (retying_memory(shape) if shape.tie_word_embeddings else 0))

    def run(self, context: StageContext) -> None:
        """Choose what to keep and write a checkpoint without the rest."""
        method = self.method or ("least_squares" if context.source.family.writer_norms else "readers")
        if context.shape.hidden_size == context.source.shape.hidden_size:
            self._write(context, {})
            context.decisions = {"method": "nothing to remove"}
        elif method in TURNING:
            self._turn(context, method)
        else:
            self._select(context, method)

    def _write(self, context: StageContext, cut: Cut, **change: Any) -> None:
        layers = range(context.source.shape.num_hidden_layers)
        rewrite = Rewrite(layers, cut, lambda _: cut, **change)
        rewrite.run(context.source, context.target, context.shape, context.runtime.progress)

    def _turn(self, context: StageContext, method: str) -> None:
        source, keep = context.source, context.shape.hidden_size

        def compute() -> dict[str, torch.Tensor]:
            total = _sum_of_grams(context)
            if method == "pca":
                basis = reading = principal_directions(total, keep)
            else:
                basis = reader_directions(total, _reader_metric(context), keep)
                reading = reconstruction(total, basis)
            found = {"basis": basis, "reading": reading.clone(), "share": _energy(basis, total) / total.trace()}
            # Another pass over the statistics, so that one layer's Gram matrix is in memory and not all of them.
            for name, gram in _residual_grams(context):
                gain = float(_energy(basis, gram) / basis.shape[1] / gram.diagonal().mean()) ** 0.5
                found[GAIN + name] = torch.tensor(gain, dtype=torch.float64)
            return found

        found = computed_once(context.work / "turn.safetensors", compute)
        basis, gains = found["basis"], {n.removeprefix(GAIN): float(found[n]) for n in found if n.startswith(GAIN)}
        rotation = Rotation(source, basis, found["reading"], gains)
        tied = _tie_again(context, rotation) if source.shape.tie_word_embeddings else {}

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tied[name].to(tensor.dtype) if name in tied else rotation.change(name, tensor)

        self._write(context, {}, change=change)
        context.lineage = context.lineage.keep_directions(basis, context.origin.shape.hidden_size)
        context.decisions = {"method": method, "share_of_energy": float(found["share"]), "gains": gains}

    def _select(self, context: StageContext, method: str) -> None:
        keep = context.shape.hidden_size
        if method == "least_squares":
            kept = choose_channels(_sum_of_grams(context), _reader_metric(context), keep)
        else:
            kept = top(_channel_scores(context, method), keep)
        gains = {
            name: float((square[list(kept)].mean() / square.mean()).sqrt())
            for name, _, square in _norm_moments(context)
        }

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.float() * gains[name]).to(tensor.dtype) if name in gains else tensor

        self._write(context, {"hidden": torch.tensor(kept)}, change=change)
        context.lineage = context.lineage.keep_channels(kept)
        context.decisions = {"method": method, "kept_channels": list(kept), "gains": gains}


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


def _sum_of_grams(context: StageContext) -> torch.Tensor:
    return sum(gram for _, gram in _residual_grams(context))


def _reader_metric(context: StageContext) -> torch.Tensor:
    """The sum over all linears W on normalised states x of W^T W / mean |W x|^2, gains included: all count the same."""
    source, family = context.source, context.source.family
    readers = {
        f"{family.layer_prefix(layer)}{norm}.weight": [
            f"{family.layer_prefix(layer)}{reader}.weight" for reader in names
        ]
        for layer in range(source.shape.num_hidden_layers)
        for norm, names in family.norm_readers.items()
    }
    readers[family.final_norm] = [family.embedding if source.shape.tie_word_embeddings else family.head]
    total = torch.zeros(source.shape.hidden_size, source.shape.hidden_size)
    for norm, gram in _residual_grams(context):
        gain = source.read(norm).float()
        for name in readers[norm]:
            weight = source.read(name)
            # A softmax does not see what all logits have in common.
            mean = _mean_row(weight) if norm == family.final_norm else 0.0
            square = sum((part := (weight[rows].float() - mean) * gain).T @ part for rows in row_slices(len(weight)))
            total += square / (square * gram).sum().clamp_min(1e-30)
    return total


def _mean_row(weight: torch.Tensor) -> torch.Tensor:
    return sum(weight[rows].float().sum(0) for rows in row_slices(len(weight))) / len(weight)


def _tie_again(context: StageContext, rotation: Rotation) -> dict[str, torch.Tensor]:
    """The shared matrix and the final norm's gain, by name, of an embedding and a head that turning makes two."""
    source, family = context.source, context.source.family
    shared = source.read(family.embedding)
    embedding, head = (rotation.change(name, shared) for name in (family.embedding, family.head))
    gram = (
        rotation.basis.T @ context.lineage.project_gram(context.statistics().final()["residual_gram"]) @ rotation.basis
    )
    gain = torch.full((len(gram),), rotation.gains[family.final_norm])
    moments = pair_moments(embedding, head)
    tied = tie_least_squares(moments, gain, gram / gram.diagonal().mean(), OUTPUT_WEIGHT)
    return {family.embedding: tied.matrix(embedding, head, moments), family.final_norm: tied.gain}


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
