"""Work of an unfinished evaluation on disk: the states of the present walk, and the scores of earlier walks."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.checkpoint.writer import write_json
from autoglm_compress.evaluation.batches import Batch
from autoglm_compress.hashing import hash_of, key_of
from autoglm_compress.versions import package_versions

SPARE = 4
"""States go to the disk only if this many times their bytes are free."""


def evaluation_work(folder: Path, evaluated: Any) -> Path:
    """The folder from which a killed evaluation continues, with the same scores as without the kill.

    Args:
        folder: where work lies.
        evaluated: the checkpoint and device, as plain data. Versions and threads count too.
    """
    return folder / f"evaluation-{key_of([evaluated, package_versions(), torch.get_num_threads()])}"


class WalkStore:
    """One walk within a work folder, identified by a hash of its batches and of the requests."""

    def __init__(self, work: Path, batches: list[Batch], asked: list[Any]) -> None:
        described = json.dumps([[[batch.shared, batch.rows] for batch in batches], asked])
        name = hash_of(described)
        self._work = work
        self._states = work / f"walk-{name}"
        self._scores = work / f"walk-{name}.json"

    def states(self, nbytes: int) -> Path | None:
        """The folder for so many bytes of states. None if the disk is nearly full: then they stay in memory.

        A walk that cannot be continued is better than none.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        return self._states if shutil.disk_usage(self._work).free > SPARE * nbytes else None

    def scores(self) -> dict[int, tuple[float, bool]] | None:
        """The score of each request by its number, None if the walk was never finished."""
        if not self._scores.exists():
            return None
        found = json.loads(self._scores.read_text(encoding="utf-8"))
        return {number: (value, greedy) for number, value, greedy in found}

    def keep(self, scores: dict[int, tuple[float, bool]]) -> None:
        """Write the scores of a finished walk, and delete its states."""
        write_json(self._scores, [[number, *score] for number, score in scores.items()], indent=None)
        shutil.rmtree(self._states, ignore_errors=True)
