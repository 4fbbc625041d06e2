"""One adapter for images and sounds: fitted, what is before it trained, and then chosen by predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.fitting.adapter_descent import SharedTowers, batches_of
from autoglm_compress.fitting.descent import Descent
from autoglm_compress.fitting.shared_adapter import ByKind, average, fit_shared, gram_of, relative_errors, spread
from autoglm_compress.forward.costs import FP32, FP64, walk_memory
from autoglm_compress.forward.features import Features
from autoglm_compress.forward.hidden_states import buffer_bytes
from autoglm_compress.forward.projections import ProjectedChats
from autoglm_compress.runtime import Runtime

Changed = dict[str, torch.Tensor]
"""Tensors of towers, by their names in a checkpoint."""


def adapter_memory(shape: ModelShape, at_once: int) -> int:
    """Bytes of the towers in fp32 with as much for gradients and activations, of the fit, or of a walk to compare.

    The fit has two Gram matrices of each kind in fp64, their sums, and the factors of a sum; and some projections.
    """
    size = _inputs(shape) + 1
    towers = sum(2 * FP32 * tower.parameters + tower.bytes for tower in shape.kept)
    fitting = FP64 * (8 * size**2 + 6 * size * shape.hidden_size)
    return max(towers, fitting, walk_memory(shape, at_once))


def adapter_scratch(shape: ModelShape, tokens: int) -> int:
    """Bytes of disk for what goes into the projections, in fp32, and for a walk's states."""
    return FP32 * tokens * _inputs(shape) + buffer_bytes(shape, tokens)


def _inputs(shape: ModelShape) -> int:
    return max(shape.projection(kind)["weight"][1] for kind in shape.family.projections)


@dataclass(frozen=True)
class Choice:
    """The tensors that sharing changes, what goes on record, and a warning if something was not done."""

    changed: Changed
    record: dict[str, Any]
    warning: str | None


class AdapterChoice:
    """Finds the one adapter of a checkpoint that has features of a run's chats.

    Args:
        source: the checkpoint.
        rows: the rows to fit to and those that decide.
        work: a folder that survives a kill.
        runtime: where to compute, alone.

    Raises:
        UserError: no row that is fitted to has a feature of some kind.
    """

    def __init__(self, source: Checkpoint, rows: DividedRows, work: Path, runtime: Runtime) -> None:
        assert isinstance(source.features, Features)  # as every model with towers has
        self._source, self._features, self._work, self._runtime = source, source.features, work, runtime
        self._inputs = ProjectedChats(source, work / "inputs")
        found, decides = torch.cat(rows.batches), torch.cat(rows.deciding)
        self._deciding_rows = found[decides]
        fitted, deciding = (self._features.chats_in(part) for part in (found[~decides], self._deciding_rows))
        # In an order that a run which was killed has again.
        self._fitted = sorted(fitted, key=self._features.content)
        self._deciding = sorted(deciding - fitted, key=self._features.content)
        self._inputs.record([*self._fitted, *self._deciding], runtime)
        self._projections = {
            kind: torch.cat(
                [source.read(f"{each.linear}.weight"), source.read(f"{each.linear}.bias")[:, None]], dim=1
            ).double()
            for kind, each in source.family.projections.items()
        }
        self._train, self._judged = self._grams(self._fitted), self._grams(self._deciding or self._fitted)
        for kind in self._projections:
            if kind not in self._train:
                raise UserError(
                    f"calibration.source: none of the rows to fit to has an {kind} part: raise calibration.samples, or "
                    f"the share of the source that has {kind} parts."
                )
        self._spreads = {kind: spread(gram, self._projections[kind]) for kind, gram in self._train.items()}

    def choose(self, passes: int) -> Choice:
        """Fit the adapter, train what is before it for some passes over the chats, and keep that if it is better."""
        shared, strength = self._closed_form()
        changed, errors, warning, trained = self._placed(shared), {}, None, False
        for name, weight in (("average", average(self._projections)), ("closed_form", shared)):
            errors[name] = relative_errors(weight, self._judged, self._projections, self._spreads)
        record: dict[str, Any] = {"strength": strength}
        divergence: dict[str, float] = {}
        if passes and not self._deciding:
            warning = "no row that decides has an image or a sound: what is before the shared adapter is not trained"
        elif passes:
            moved, descent, errors["trained"] = self._trained(shared, passes)
            record |= {"loss_before": descent.before, "loss_after": descent.after}
            for name, candidate in (("closed_form", changed), ("trained", changed | moved)):
                divergence[name] = self.divergence(candidate, [self._deciding_rows])
            trained = descent.improved and divergence["trained"] < divergence["closed_form"]
            if trained:
                changed |= moved
            else:
                warning = (
                    "training what is before the shared adapter brought predictions on rows that decide no nearer: it "
                    "stays as it was"
                )
        record |= {"errors": errors, "deciding_divergence": divergence, "trained": trained}
        return Choice(changed, record, warning)

    def on_held_out(self, changed: Changed, batches: list[torch.Tensor]) -> dict[str, float]:
        """The divergence of predictions from those before, for the chosen adapter and for the mean of those before.

        Empty if no row of the batches has an image or a sound.
        """
        if not self._features.chats_in(batches):
            return {}
        candidates = {"average": self._placed(average(self._projections)), "chosen": changed}
        return {name: self.divergence(each, batches) for name, each in candidates.items()}

    def divergence(self, changed: Changed, batches: list[torch.Tensor]) -> float:
        """The mean KL divergence in nats from the checkpoint's predictions if it had changed towers.

        Over the rows of batches [rows, length] that have a feature.
        """
        rows = torch.cat([row[None] for batch in batches for row in batch if self._features.chats_in([row])])
        other = Checkpoint(self._source.folder, self._source.family)
        other.features = self._features.of(other, changed)
        return agreement(self._source, other, [rows], self._runtime).divergence

    def _closed_form(self) -> tuple[torch.Tensor, float]:
        """The one projection [out, in + 1] in fp64 and the strength of its ridge."""

        def compute() -> dict[str, torch.Tensor]:
            found = fit_shared(self._train, self._judged, self._projections)
            return {"weight": found.weight, "strength": torch.tensor(found.strength or 0.0, dtype=torch.float64)}

        found = computed_once(self._work / "closed-form.safetensors", compute)
        return found["weight"], float(found["strength"])

    def _trained(self, shared: torch.Tensor, passes: int) -> tuple[Changed, Descent, dict[str, float]]:
        """The trained tensors, the loss of it, and the errors after it by kind."""
        device, file = self._runtime.device, self._work / "trained.safetensors"

        def compute() -> dict[str, torch.Tensor]:
            towers = SharedTowers(self._source, self._inputs, self._projections, shared, self._spreads, device)
            descent = towers.fit(batches_of(self._fitted, self._deciding), passes, self._runtime.progress)
            numbers = {"before": descent.before, "after": descent.after}
            numbers |= {f"error of {kind}": error for kind, error in towers.errors(self._deciding).items()}
            stored = {name: tensor.to(self._source.dtype_of(name)) for name, tensor in towers.trained().items()}
            return stored | {name: torch.tensor(each, dtype=torch.float64) for name, each in numbers.items()}

        found = computed_once(file, compute)
        descent = Descent(float(found.pop("before")), float(found.pop("after")))
        errors = {kind: float(found.pop(f"error of {kind}")) for kind in self._judged}
        return found, descent, errors

    def _placed(self, weight: torch.Tensor) -> Changed:
        """A projection [out, in + 1] in all places, as it is stored."""
        found: Changed = {}
        for each in self._source.family.projections.values():
            for name, tensor in (("weight", weight[:, :-1]), ("bias", weight[:, -1])):
                found[f"{each.linear}.{name}"] = tensor.to(self._source.dtype_of(f"{each.linear}.{name}")).contiguous()
        return found

    def _grams(self, numbers: list[int]) -> ByKind:
        """The Gram matrices of the features in some chats."""
        found: dict[str, torch.Tensor] = {}
        for number in numbers:
            for kind, inputs in self._inputs.of(number).items():
                found[kind] = found.get(kind, 0) + gram_of(inputs)
        return found
