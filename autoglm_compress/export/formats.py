"""What an export to a format has to know and do, and which formats there are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.export.exactness import Exactness
from autoglm_compress.export.gguf_format import GgufFormat
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.mnn_format import MnnFormat
from autoglm_compress.export.onnx_format import OnnxFormat
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import EnginePrediction, Limits, ProofRows


class ExportFormat(Protocol):
    """One format. All that can be refused is refused by the checks, before there is a checkpoint to export."""

    name: str
    engine: str
    """What runs such files, for people."""
    engine_package: str
    """The package by which the engine is there."""

    def check(self, shape: ModelShape, options: ExportOptions) -> None:
        """Raise PlanError if a model of this shape cannot be exported, or what writing needs is not installed."""

    def check_model(self, shape: ModelShape, config: Any, folder: Path) -> None:
        """Raise UserError if the text tower's `transformers` config, or the tokenizer in a folder, is not the engine's.

        The folder may be without one, where it is not downloaded yet.
        """

    def warnings(self, shape: ModelShape, options: ExportOptions) -> list[str]:
        """What the user should know before."""

    def nbytes(self, shape: ModelShape, options: ExportOptions) -> int:
        """Bytes of the files, within a few MB."""

    def memory(self, shape: ModelShape, options: ExportOptions) -> int:
        """Bytes of memory that writing takes, beside the process's own."""

    def file(self, job: ExportJob) -> Path:
        """The file that the engine is given."""

    def files(self, job: ExportJob) -> list[Path]:
        """That file, and those that hold its tensors."""

    def write(self, job: ExportJob) -> Exactness:
        """Write the files; those that a killed process wrote may be there."""

    def longest(self, checkpoint: Checkpoint) -> int:
        """How many tokens the engine reads as the checkpoint does."""

    def predict(self, job: ExportJob, rows: ProofRows) -> EnginePrediction:
        """What the engine makes of rows.

        Raises:
            EngineError: it does not take the file.
        """

    def prove_towers(self, job: ExportJob) -> dict[str, Any]:
        """What goes on record of towers beside the text that the files have; nothing where they have none.

        Raises:
            EngineError: the engine does not take them.
            UserError: it computes something else with them.
        """

    def limits(self, shape: ModelShape, options: ExportOptions) -> Limits:
        """How far the engine's predictions may be from the checkpoint's."""

    def details(self, job: ExportJob) -> dict[str, Any]:
        """What goes on record beside the rest."""

    def commands(self, file: str) -> str:
        """How to run the file, in Markdown."""

    def beside(self, file: str) -> dict[str, str]:
        """Small files that belong to it, as text by their names."""


FORMATS: Mapping[str, ExportFormat] = {"gguf": GgufFormat(), "mnn": MnnFormat(), "onnx": OnnxFormat()}
