"""Narrow the residual stream."""

from dataclasses import replace
from typing import Literal

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.reconstruction.importance import random_scores, top
from autoglm_compress.reconstruction.surgery import Rewrite
from autoglm_compress.stages.base import PlanError, Size, Stage, StageContext, resolve_size


class Width(Stage):
    """Keep the most active channels of the residual stream, the same ones in every layer.

    `activation` is Minitron's score (Muralidharan et al. 2024): the mean absolute output of a channel, summed over all
    norms. `magnitude` is the norm of a channel's column of the embedding. A norm that now runs over fewer channels
    divides by another root mean square, so each gain is multiplied by the ratio that calibration shows.
    """

    stage: Literal["width"]
    hidden_size: Size
    method: Literal["activation", "magnitude", "random"] = "activation"

    uses_calibration = True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The shape with a narrower residual stream."""
        keep = resolve_size(self.hidden_size, shape.hidden_size)
        if not 1 <= keep <= shape.hidden_size:
            raise PlanError("hidden_size", f"{keep}: expected 1 to {shape.hidden_size}, the source's hidden_size")
        if keep % 8:
            lower = keep // 8 * 8
            raise PlanError(
                "hidden_size", f"{keep}: not divisible by 8, which kernels need; use {lower} or {lower + 8}"
            )
        return replace(shape, hidden_size=keep)

    def run(self, context: StageContext) -> None:
        """Choose channels and write a checkpoint without the others."""
        kept = top(self._score(context), context.shape.hidden_size)
        source, family = context.source, context.source.family
        gains = self._gains(context, kept) if len(kept) < source.shape.hidden_size else {}

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            gain = gains.get(name)
            return tensor if gain is None else (tensor.float() * gain).to(tensor.dtype)

        cut = {"hidden": torch.tensor(kept)}
        Rewrite(range(source.shape.num_hidden_layers), cut, lambda _: cut, change).run(
            source, context.target, context.shape, context.progress
        )
        context.lineage = context.lineage.keep_channels(kept)
        context.decisions = {"kept_channels": list(kept), "final_norm_gain": gains.get(family.final_norm, 1.0)}

    def _norms(self, context: StageContext) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Each norm's tensor name and its two moments [hidden_size] over the channels present."""
        statistics, family = context.statistics(), context.source.family
        channels = list(context.lineage.channels)
        norms = []
        for layer, origin in enumerate(context.lineage.layers):
            moments = statistics.layer(origin)
            norms += [
                (
                    f"{family.layer_prefix(layer)}{norm}.weight",
                    moments[f"{norm}.mean_abs"],
                    moments[f"{norm}.mean_square"],
                )
                for norm in family.hidden_norms
            ]
        final = statistics.final()
        norms.append((family.final_norm, final["mean_abs"], final["mean_square"]))
        return [(name, absolute[channels], square[channels]) for name, absolute, square in norms]

    def _score(self, context: StageContext) -> torch.Tensor:
        """Scores [hidden_size] of the channels present."""
        if self.method == "random":
            return random_scores(context.source.shape.hidden_size, context.seed, 0)
        if self.method == "magnitude":
            return context.source.read(context.source.family.embedding).float().norm(dim=0)
        after_writers = tuple(f"{norm}.weight" for norm in context.source.family.writer_norms.values())
        return sum(
            absolute * context.source.read(name).float().abs()
            for name, absolute, _ in self._norms(context)
            if not name.endswith(after_writers or "\n")
        )

    def _gains(self, context: StageContext, kept: tuple[int, ...]) -> dict[str, float]:
        """Root mean square over the kept channels by that over all present ones, for each norm."""
        return {
            name: float((square[list(kept)].mean() / square.mean()).sqrt()) for name, _, square in self._norms(context)
        }
