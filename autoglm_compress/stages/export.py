"""Files for an engine from a checkpoint."""

from pathlib import Path
from typing import Literal

from autoglm_compress.architecture import Family, ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint.described import describe
from autoglm_compress.export.exporting import export, memory_needed
from autoglm_compress.export.formats import FORMATS
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import proof_scratch
from autoglm_compress.stages.base import Makes, Stage, StageContext
from autoglm_compress.stages.needs import Needs


class Export(Stage, ExportOptions):
    """Write the checkpoint for an engine, with its integers and scales as they are.

    `gguf` is for llama.cpp, Ollama and the apps that are built on it, `onnx` for ONNX Runtime, which rounds activations
    to 8 bits beside integers, or nothing with `accuracy_level: 0`. Embedding and head have 16 bits as in the
    checkpoint, or 8 with `embedding_bits: 8`. The engine then loads the file, and its predictions on held-out text must
    be the checkpoint's; without the engine the file is not proven, and the record says `verified: false`.
    """

    stage: Literal["export"]

    makes = Makes.ARTIFACT
    compares_held_out = True
    reads_quantized = True

    def plan(self, shape: ModelShape) -> ModelShape:
        """The same shape."""
        FORMATS[self.format].check(shape, self)
        return shape

    def check_source(self, folder: Path, family: Family | None) -> None:
        """Whether the engine runs the config and reads text as the tokenizer does."""
        model = describe(folder, family)
        FORMATS[self.format].check_model(model.shape, model.text_config, folder)

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        """The files, and what writing the largest tensor or the proof takes."""
        kind = FORMATS[self.format]
        memory = memory_needed(kind, shape, self)
        return Needs(artifact=kind.nbytes(shape, self), memory=memory, scratch=proof_scratch(shape))

    def warnings(self, shape: ModelShape) -> list[str]:
        """What the format warns of."""
        return FORMATS[self.format].warnings(shape, self)

    def run(self, context: StageContext) -> None:
        """Write the files, prove them, describe them."""
        job = ExportJob(context.source, context.result, context.work, self, context.runtime)
        context.decisions = export(FORMATS[self.format], job, context.text.held_out())
