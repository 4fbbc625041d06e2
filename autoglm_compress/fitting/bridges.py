"""Fitting the linears of towers that a cut of the residual stream's width has changed: those by which towers write to
the stream, and those within a tower that have lost some of the neurons they read.

Inputs are those of the compressed checkpoint's tower, targets what the same linears of the original's tower make of the
same images and sounds; of what is written to the stream, in the directions that are left. The linears that read neurons
are fitted at once, each for the inputs it has so far, and then those that write to the stream, for what they read by
then. As that is no descent, the latter are fitted beside unchanged readers too, and the better of the two stays.

The towers of one checkpoint are in memory at a time, so inputs and targets of some tokens of each image and sound wait
in files. As in other fits of what is written to the stream, a feature has the weight 1 / mean square of the original's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from autoglm_compress.atomic import read_object, write_json
from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.reader import TowerFeatures
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.cutting.bridges import neuron_readers
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.errors import UserError
from autoglm_compress.fitting.affine import with_one
from autoglm_compress.fitting.fit_records import fit_record
from autoglm_compress.fitting.ridge import Examples, Fit, Moments, NotFiniteError, fit
from autoglm_compress.fitting.tower_examples import TowerExamples, divided_chats
from autoglm_compress.runtime import Runtime

NO_ROWS = "no image or sound in calibration rows, both in some to fit to and in some that decide"
TARGETS, READ, READ_AFTER = "targets", "read", "read-after"
"""The files of what the original's linears give, and of what the compressed checkpoint's read before readers are fitted
and after it."""


@dataclass(frozen=True)
class BridgeFits:
    """What became of bridges: tensors that are better, by name, and the record of each linear's fit, by module.

    `unfitted` are the linears that no rows could decide about.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfitted: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """What a record says of them. Nothing where there was nothing to fit."""
        found: dict[str, Any] = {}
        if self.fits:
            found["bridges"] = self.fits
        if self.unfitted:
            found["unfitted_bridges"] = dict.fromkeys(self.unfitted, NO_ROWS)
        return found


def writing_linears(checkpoint: Checkpoint) -> list[str]:
    """The linears of kept towers that write to the residual stream.

    A shared projection is not among them: fitted for images and for sounds, it would be two.
    """
    shape = checkpoint.shape
    shared = {each.linear for each in shape.family.projections.values()} if shape.shared_adapter else set[str]()
    tensors = (tensor for tower in shape.kept for tensor in tower.tensors if tensor.writes)
    return [module for tensor in tensors if (module := tensor.name.removesuffix(".weight")) not in shared]


def fit_bridges(
    original: Checkpoint, compressed: Checkpoint, lineage: Lineage, rows: DividedRows, runtime: Runtime, folder: Path
) -> BridgeFits:
    """Fit the bridges of a checkpoint whose residual stream is narrower than that of the original it was cut from.

    With several processes, the first one fits, and all return the same tensors.

    Args:
        original: whose features are the target.
        compressed: what it was cut to.
        lineage: which directions of the original's stream are left.
        rows: token ids to fit to and to decide by, the same in all processes.
        runtime: where it runs.
        folder: for the result and what waits for it, so that a killed stage does not repeat it.

    Raises:
        UserError: features are NaN or infinite.
    """
    if compressed.shape.hidden_size == original.shape.hidden_size:
        return BridgeFits()
    processes = runtime.processes
    found = None
    if processes.is_first:
        found = _fitted(original, compressed, lineage, rows, runtime, folder)
    fits, unfitted, names = processes.tell(found and (found.fits, found.unfitted, list(found.tensors)))
    tensors = found.tensors if found else {name: _empty(compressed, name) for name in names}
    return BridgeFits({name: processes.copy_first(tensors[name]) for name in names}, fits, unfitted)


def _empty(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.empty(checkpoint.infos[name].shape, dtype=checkpoint.dtype_of(name))


def _fitted(
    original: Checkpoint, compressed: Checkpoint, lineage: Lineage, rows: DividedRows, runtime: Runtime, folder: Path
) -> BridgeFits:
    """The same in the one process that fits."""
    writers = writing_linears(compressed)
    fitted_to, deciding = divided_chats(compressed.features, rows)
    if not (writers or neuron_readers(compressed)):
        return BridgeFits()
    if original.features is None or compressed.features is None or not (fitted_to and deciding):
        return BridgeFits(unfitted=tuple(writers))
    record, tensors = folder / "bridges.json", folder / "bridges.safetensors"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        waiting = TowerExamples(folder, fitted_to, deciding)
        fitting = _Fitting(compressed, compressed.features, waiting, runtime.device)
        found = fitting.of(writers, original.features, lineage)
        save_atomically(tensors, found.tensors)
        write_json(record, {"fits": found.fits, "unfitted": found.unfitted})
    read = read_object(record)
    return BridgeFits(load_file(tensors), read["fits"], tuple(read["unfitted"]))


class _Fitting:
    """Fits linears of a checkpoint's towers from what waits in files."""

    def __init__(
        self, checkpoint: Checkpoint, features: TowerFeatures, waiting: TowerExamples, device: torch.device
    ) -> None:
        self._checkpoint, self._features = checkpoint, features
        self._waiting, self._device = waiting, device

    def of(self, writers: list[str], original: TowerFeatures, lineage: Lineage) -> BridgeFits:
        """All that are better than they were.

        Args:
            writers: the linears that write to the residual stream.
            original: the original's towers.
            lineage: which directions of the original's stream are left.
        """
        inner = [module for module in neuron_readers(self._checkpoint) if module not in writers]
        self._waiting.write(TARGETS, original, [*inner, *writers], outputs=True)
        self._waiting.write(READ, self._features, [*inner, *writers], outputs=False)
        readers = {module: self._fit(module, READ) for module in inner}
        written = {module: self._fit(module, READ, lineage) for module in writers}
        unfitted = tuple(module for module, one in (readers | written).items() if one is None)
        changed = self._tensors(readers)
        if changed:
            better = self._features.of(self._checkpoint, changed)
            self._waiting.write(READ_AFTER, better, writers, outputs=False)
            after = {module: self._fit(module, READ_AFTER, lineage) for module in writers}
            if _error(after) < _error(written):
                before = {module: one.error_before for module, one in written.items() if one is not None}
                whole = {module: one and replace(one, error_before=before[module]) for module, one in after.items()}
                return BridgeFits(changed | self._tensors(after), _records(readers | whole), unfitted)
        kept = {
            module: one and replace(one, strength=None, error_after=one.error_before) for module, one in readers.items()
        }
        return BridgeFits(self._tensors(written), _records(kept | written), unfitted)

    def _fit(self, module: str, inputs: str, lineage: Lineage | None = None) -> Fit | None:
        """The fit of a linear, of one that writes to the stream if a lineage is given; None if no rows can decide."""
        train, held_out = (self._sums(module, inputs, lineage, decides) for decides in (False, True))
        if train is None or held_out is None:
            return None
        try:
            [found] = fit(train, held_out, self._affine(module))
        except NotFiniteError as error:
            raise UserError(f"{self._checkpoint.folder}: {module}: {error}.") from None
        return found

    def _sums(self, module: str, inputs: str, lineage: Lineage | None, decides: bool) -> Moments | Examples | None:
        given, target = (self._waiting.read(kind, module, decides) for kind in (inputs, TARGETS))
        if given is None or target is None:
            return None
        given, target = with_one(given.to(self._device), self._has_bias(module)), target.to(self._device)
        weights = torch.ones_like(target[:, 0])
        if lineage is not None:
            target = lineage.project(target)
            weights = 1 / target.square().mean(-1).clamp_min(1e-12)
        few = len(given) < given.shape[1]
        sums = Examples() if few else Moments.zeros(given.shape[1], target.shape[1], self._device)
        sums.add(given, target, weights)
        return sums

    def _has_bias(self, module: str) -> bool:
        return f"{module}.bias" in self._checkpoint.infos

    def _affine(self, module: str) -> torch.Tensor:
        """The linear's weight [out, in] in fp32, with its bias as one more column if it has one."""
        names = [f"{module}.weight", *([f"{module}.bias"] if self._has_bias(module) else [])]
        columns = [self._checkpoint.read(name).to(self._device).float() for name in names]
        return torch.cat([part if part.dim() == 2 else part[:, None] for part in columns], dim=1)

    def _tensors(self, fits: Mapping[str, Fit | None]) -> dict[str, torch.Tensor]:
        """The tensors, as they are stored, of the linears that are better."""
        found: dict[str, torch.Tensor] = {}
        for module, one in fits.items():
            if one is None or one.strength is None:
                continue
            columns = self._checkpoint.infos[f"{module}.weight"].shape[1]
            found[f"{module}.weight"] = one.weight[:, :columns]
            if self._has_bias(module):
                found[f"{module}.bias"] = one.weight[:, -1]
        return {name: part.to("cpu", self._checkpoint.dtype_of(name)) for name, part in found.items()}


def _error(fits: Mapping[str, Fit | None]) -> float:
    return sum(one.error_after for one in fits.values() if one is not None)


def _records(fits: Mapping[str, Fit | None]) -> dict[str, dict[str, Any]]:
    return {module: fit_record(one) for module, one in fits.items() if one is not None}
