"""GGUF, which llama.cpp and what is built on it run."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.export import llama_cpp
from autoglm_compress.export.eight_bits import EndsError
from autoglm_compress.export.engine_process import has_package
from autoglm_compress.export.exactness import Exactness
from autoglm_compress.export.gguf_check import require_same_ids
from autoglm_compress.export.gguf_families import config_problem, context_length, shape_problem
from autoglm_compress.export.gguf_tensors import stored_tensors
from autoglm_compress.export.gguf_tokenizer import EngineTokenizer, engine_tokenizer
from autoglm_compress.export.gguf_usage import commands, modelfile
from autoglm_compress.export.gguf_writer import most_bytes_type, write_gguf
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import ENGINE_LOGITS, EnginePrediction, Limits, ProofRows, predicted, row_bytes
from autoglm_compress.export.text_models import sliding_window, towers_left
from autoglm_compress.export.vision_families import Pixels, could_go_along, left_behind, pixels_of
from autoglm_compress.export.vision_proof import prove_vision, vision_proof_memory
from autoglm_compress.export.vision_writer import matrix_type, vision_bytes, write_vision

EXACT_TYPES = {"F32": Limits(1e-5, 2e-5), "F16": Limits(1e-4, 2e-4)}
ROUNDING_ACTIVATIONS = Limits(5e-3, 1e-2)
"""With integers as weights, llama.cpp rounds activations to 8 bits."""
ENGINE_BYTES = 64 << 20
"""llama.cpp without a model and without logits; the file's pages are the system's, which takes them back at need."""
UNPACKING = 8
"""Bytes for each integer while packed ones are taken apart."""


class GgufFormat:
    """Files for llama.cpp (see `ExportFormat`)."""

    name = "gguf"
    engine = "llama.cpp"
    engine_package = "xllamacpp"

    def check(self, shape: ModelShape, options: ExportOptions) -> None:
        """Whether GGUF holds the shape and llama.cpp runs it."""
        if not has_package("gguf"):
            raise PlanError("format", "gguf is not installed: pip install 'autoglm-compress[gguf]'")
        if problem := shape_problem(shape):
            raise PlanError("format", f"gguf: {problem}")
        try:
            stored_tensors(shape, options.embedding_bits)
        except ValueError as error:
            option = "embedding_bits" if isinstance(error, EndsError) else "format"
            raise PlanError(option, f"gguf: {error}") from None

    def check_model(self, shape: ModelShape, config: Any, folder: Path) -> None:
        """Whether llama.cpp runs the config, and reads text as the tokenizer does."""
        if problem := config_problem(shape, config):
            raise UserError(f"{folder / 'config.json'}: {problem}: it cannot be exported to GGUF.")
        if not has_tokenizer(folder):
            return  # of a hub model that is not downloaded yet
        tokenizer = load_tokenizer(folder)
        told = engine_tokenizer(tokenizer, shape.vocab_size, str(folder))
        if has_package(self.engine_package):
            require_same_ids(shape, config, tokenizer, told, str(folder))

    def warnings(self, shape: ModelShape, options: ExportOptions) -> list[str]:
        """What is left behind, and whether the proof can be made."""
        found = [towers_left(shape)] if shape.family.kept and not could_go_along(shape) else []
        if not has_package(self.engine_package):
            found.append(
                f"{self.engine_package} is not installed, so the file will not be proven: pip install "
                "'autoglm-compress[gguf]'"
            )
        return found

    def nbytes(self, shape: ModelShape, options: ExportOptions) -> int:
        """The tensors, and the tokenizer by a generous guess."""
        text = sum(tensor.nbytes for tensor in stored_tensors(shape, options.embedding_bits)) + 80 * shape.vocab_size
        return text + (vision_bytes(shape) if could_go_along(shape) else 0)

    def memory(self, shape: ModelShape, options: ExportOptions) -> int:
        """The largest tensor as it is and stored, with what unpacking its integers takes; the engine; or all towers."""
        writing = max(
            tensor.nbytes
            + prod(tensor.shape)
            * (UNPACKING if tensor.name.removesuffix(".weight") in shape.schemes else shape.element_bytes)
            for tensor in stored_tensors(shape, options.embedding_bits)
        )
        engine = ENGINE_BYTES + ENGINE_LOGITS * row_bytes(shape)
        return max(writing, engine, vision_proof_memory(shape) if could_go_along(shape) else 0)

    def file(self, job: ExportJob) -> Path:
        """Named as is usual: model and type."""
        kind = most_bytes_type(job.checkpoint.shape, job.options.embedding_bits)
        return job.folder / f"{job.name}-{kind}.gguf"

    def files(self, job: ExportJob) -> list[Path]:
        """The text model's file, and that of the vision tower where it goes along."""
        return [self.file(job), *([] if self._pixels(job.checkpoint) is None else [self._vision_file(job)])]

    def _vision_file(self, job: ExportJob) -> Path:
        return job.folder / f"mmproj-{job.name}-{matrix_type(job.checkpoint.shape)}.gguf"

    def _pixels(self, checkpoint: Checkpoint) -> Pixels | None:
        """What is done to pixels, where the vision tower goes along."""
        return pixels_of(checkpoint.folder) if checkpoint.family.kept and not left_behind(checkpoint) else None

    def write(self, job: ExportJob) -> Exactness:
        """Write the text model, and the vision tower where it goes along."""
        checkpoint, bits, progress = job.checkpoint, job.options.embedding_bits, job.runtime.progress
        exactness = write_gguf(checkpoint, self._told(checkpoint), self.file(job), job.name, bits, progress)
        if pixels := self._pixels(checkpoint):
            write_vision(checkpoint, pixels, self._vision_file(job), job.name, exactness, progress)
        return exactness

    def _told(self, checkpoint: Checkpoint) -> EngineTokenizer:
        return engine_tokenizer(checkpoint.tokenizer(), checkpoint.shape.vocab_size, str(checkpoint.folder))

    def longest(self, checkpoint: Checkpoint) -> int:
        """What the file says that its context is."""
        return context_length(checkpoint.model_config)

    def predict(self, job: ExportJob, rows: ProofRows) -> EnginePrediction:
        """llama.cpp's logits."""
        return predicted(llama_cpp.__name__, {"file": str(self.file(job))}, job.work, rows)

    def prove_towers(self, job: ExportJob) -> dict[str, Any]:
        """That of an image's features, where the vision tower goes along."""
        pixels = self._pixels(job.checkpoint)
        if pixels is None:
            return {}
        vision = self._vision_file(job)
        proof = prove_vision(job, self.file(job), vision, pixels, matrix_type(job.checkpoint.shape))
        return {"vision_proof": proof.as_data()}

    def limits(self, shape: ModelShape, options: ExportOptions) -> Limits:
        """By the least exact type of a matrix."""
        kinds = {tensor.type for tensor in stored_tensors(shape, options.embedding_bits) if len(tensor.shape) > 1}
        if kinds - EXACT_TYPES.keys():
            return ROUNDING_ACTIVATIONS
        return EXACT_TYPES["F16" if "F16" in kinds else "F32"]

    def details(self, job: ExportJob) -> dict[str, Any]:
        """Bytes by type, the context, and how text is read."""
        checkpoint, told = job.checkpoint, self._told(job.checkpoint)
        sizes: Counter[str] = Counter()
        for tensor in stored_tensors(checkpoint.shape, job.options.embedding_bits):
            sizes[tensor.type] += tensor.nbytes
        found: dict[str, Any] = {
            "bytes_by_type": dict(sizes),
            "context_length": self.longest(checkpoint),
            "tokenizer": {"model": told.model, "pre": told.pre},
        }
        notes = []
        if self._pixels(checkpoint) is not None:
            found["vision_file"] = self._vision_file(job).name
        elif reason := left_behind(checkpoint):
            notes.append(reason)
        if window := sliding_window(checkpoint.model_config):
            notes.append(
                f"llama.cpp has no sliding window for this family: the context of the file is the window of {window}"
            )
        if told.prefix and not told.adds_bos:
            notes.append(
                f"the tokenizer puts {checkpoint.tokenizer().convert_ids_to_tokens(told.prefix)} before a text by "
                "itself, and llama.cpp does not: write them, as the chat template does"
            )
        return found | ({"notes": notes} if notes else {})

    def commands(self, file: str) -> str:
        """llama.cpp on a computer and on Android, Ollama, Python."""
        return commands(file)

    def beside(self, file: str) -> dict[str, str]:
        """Ollama's Modelfile."""
        return {"Modelfile": modelfile(file)}
