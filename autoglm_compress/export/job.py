"""One export, as formats are given it."""

from dataclasses import dataclass
from pathlib import Path

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class ExportJob:
    """A checkpoint, the folder that its files go into, and a folder for what is there only meanwhile."""

    checkpoint: Checkpoint
    folder: Path
    work: Path
    options: ExportOptions
    runtime: Runtime

    @property
    def name(self) -> str:
        """What the model is called: as the options say, or as the checkpoint's folder without the stage's number."""
        number, _, label = self.checkpoint.folder.name.partition("-")
        return self.options.called or (label if number.isdigit() and label else self.checkpoint.folder.name)
