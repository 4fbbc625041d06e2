"""Cutting a checkpoint to one shape after the other, and measuring how far its predictions then are."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch

from autoglm_compress.calibration.tokens import batched
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import computed_once, write_json
from autoglm_compress.errors import UserError
from autoglm_compress.forward.divergence import Divergence
from autoglm_compress.forward.features import with_features_of
from autoglm_compress.forward.walk import walk
from autoglm_compress.progress import silent
from autoglm_compress.shaping.costs import Place
from autoglm_compress.shaping.grid import Grid
from autoglm_compress.shaping.search import MOST_MEASURED
from autoglm_compress.stages.base import Stage, StageContext
from autoglm_compress.stages.surgeries import Refuses, cut, surgeries

MEASURED_TOKENS = 4096
"""Tokens, at most, on which shapes are compared."""


def explicit(stage: Stage) -> dict[str, Any]:
    """A stage as a recipe gives it."""
    return stage.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


class Trials:
    """Measures shapes of the checkpoint that a stage takes. Measurements are kept, so a killed search continues."""

    def __init__(self, context: StageContext, grid: Grid, refuses: Refuses) -> None:
        self._shown = context.runtime.progress
        self._context = replace(context, runtime=replace(context.runtime.alone(), progress=silent()))
        self._grid = grid
        self._refuses = refuses
        self._file = context.work / "measured.json"
        self._known: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def steps(self, place: Place, depth_method: str) -> tuple[Stage, ...]:
        """The surgeries to the shape at a place."""
        found = surgeries(self._grid.source, self._grid.shape(place), depth_method, self._refuses)
        assert found is not None  # the grid holds what can be reached
        return found

    def measure(self, place: Place, depth_method: str) -> float:
        """The divergence of the predictions at a place from those of the checkpoint that is cut, in nats."""
        steps = self.steps(place, depth_method)
        key = json.dumps([explicit(stage) for stage in steps])
        if key not in self._known:
            self._known[key] = self._measured(steps)
            write_json(self._file, self._known)
            sizes = ", ".join(f"{name} {size}" for name, size in self._grid.shape(place).cut_sizes.items())
            self._shown.note(
                f"shape {len(self._known)} of {MOST_MEASURED} at most: {sizes}: {self._known[key]:.3f} nats"
            )
        return self._known[key]

    def _measured(self, steps: Sequence[Stage]) -> float:
        context, folder = self._context, self._context.work / f"trial-{len(self._known)}"
        made = cut(context, steps, folder, folder / "result")[-1].result
        checkpoint = with_features_of(Checkpoint(made, context.source.family), context.source)
        last = list(walk(checkpoint, self._rows, None, runtime=context.runtime, title="shape"))
        divergence = self._reference.of_other(checkpoint, torch.cat(last))
        if not isfinite(divergence):
            raise UserError(
                f"{context.source_folder}: once it is cut, predictions are NaN or infinite for some tokens: "
                "the model overflows in the dtype it is computed in, or its weights are damaged."
            )
        shutil.rmtree(folder)
        return divergence

    @cached_property
    def _rows(self) -> list[torch.Tensor]:
        """Batches of rows that decide, as far as they are needed."""
        divided = self._context.text.divided()
        rows = torch.cat(divided.batches)[torch.cat(divided.deciding)]
        return batched(rows[: max(1, MEASURED_TOKENS // rows.shape[1])])

    @cached_property
    def _reference(self) -> Divergence:
        context = self._context

        def states() -> dict[str, torch.Tensor]:
            last = list(walk(context.source, self._rows, None, runtime=context.runtime, title="reference"))
            return {"states": torch.cat(last)}

        found = computed_once(context.work / "reference.safetensors", states)
        return Divergence(context.source, found["states"], context.runtime.device)
