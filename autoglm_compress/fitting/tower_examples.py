"""What goes through linears of towers, in files: the towers of two checkpoints need not be in memory at once."""

from collections.abc import Iterable
from functools import partial
from math import ceil
from pathlib import Path

import torch
from safetensors import safe_open

from autoglm_compress.calibration.divided_rows import DividedRows
from autoglm_compress.checkpoint.reader import TowerFeatures
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.fitting.refit_costs import BRIDGE_TOKENS


def divided_chats(features: TowerFeatures | None, rows: DividedRows) -> tuple[set[int], set[int]]:
    """The numbers of chats with features in rows to fit to, and of those that have them in deciding rows alone."""
    if features is None:
        return set(), set()
    pairs = list(zip(rows.batches, rows.deciding, strict=True))
    deciding = {chat for batch, decides in pairs for chat in features.chats_in(batch[decides])}
    fitted = {chat for batch, decides in pairs for chat in features.chats_in(batch[~decides])}
    return fitted, deciding - fitted


class TowerExamples:
    """What goes through linears for some tokens of each chat, in a file for each chat."""

    def __init__(self, folder: Path, fitted_to: set[int], deciding: set[int]) -> None:
        """The numbers of chats to fit to, and of those that decide."""
        self._folder = folder
        self._chats = {False: sorted(fitted_to), True: sorted(deciding)}
        self._most = ceil(BRIDGE_TOKENS / len(fitted_to | deciding))

    def _file(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}.safetensors"

    def write(self, kind: str, features: TowerFeatures, modules: Iterable[str], outputs: bool) -> None:
        """Let towers see all chats, and keep the inputs or the outputs of some of their linears."""
        passed: dict[str, list[torch.Tensor]] = {}

        def note(module: str, given: torch.Tensor, made: torch.Tensor) -> None:
            passed.setdefault(module, []).append((made if outputs else given).cpu())

        watchers = {module: partial(note, module) for module in modules}
        for number in features.watch([*self._chats[False], *self._chats[True]], watchers):
            kept = {module: self._some(torch.cat(parts)) for module, parts in passed.items()}
            save_atomically(self._file(kind, number), kept)
            passed.clear()

    def _some(self, tokens: torch.Tensor) -> torch.Tensor:
        """Evenly spaced tokens, as many as there may be of one chat."""
        return tokens[:: ceil(len(tokens) / self._most)]

    def read(self, kind: str, module: str, decides: bool) -> torch.Tensor | None:
        """What a linear had of all chats to fit to, or of all that decide [tokens, channels]; None if nothing."""
        parts = []
        for number in self._chats[decides]:
            with safe_open(self._file(kind, number), framework="pt") as file:
                if module in file.keys():  # noqa: SIM118 - no mapping
                    parts.append(file.get_tensor(module))
        return torch.cat(parts) if parts else None
