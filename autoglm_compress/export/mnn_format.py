"""MNN, whose `llm` engine runs on phones."""

from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.atomic import read_object, write_json
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.export import mnn_builder, mnn_engine
from autoglm_compress.export.eight_bits import BLOCK
from autoglm_compress.export.engine_process import EngineError, ask_engine, has_package
from autoglm_compress.export.exactness import Exactness, Rounding
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.mnn_check import reading_problems, require_same_ids
from autoglm_compress.export.mnn_families import shape_problem
from autoglm_compress.export.mnn_names import FILES, GRAPH, SETTINGS
from autoglm_compress.export.mnn_sizes import engine_bytes, graph_bytes, scheme_problem, stored_bytes, writing_bytes
from autoglm_compress.export.mnn_usage import commands
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.own_graphs import config_problem
from autoglm_compress.export.proof import ENGINE_LOGITS, EnginePrediction, Limits, ProofRows, predicted, row_bytes

PACKAGES = ("MNN", "llmexport")
EXACT, ROUNDED, ROUNDED_ENDS = Limits(1e-5, 2e-5), Limits(1e-4, 2e-4), Limits(5e-3, 1e-2)
"""For weights in bf16, for others, which fp16 rounds, and for ends in 8 bits."""
LOW_MEMORY = 1e-2
"""The largest KL divergence, in nats, from the engine's exact mode to the one that rounds activations to 8 bits."""


class MnnFormat:
    """Files for MNN (see `ExportFormat`)."""

    name = "mnn"
    engine = "MNN"
    engine_package = "MNN"

    def check(self, shape: ModelShape, options: ExportOptions) -> None:
        """Whether there is a graph for the shape."""
        if missing := [name for name in PACKAGES if not has_package(name)]:
            raise PlanError("format", f"{', '.join(missing)}: not installed: pip install 'autoglm-compress[mnn]'")
        if problem := shape_problem(shape) or scheme_problem(shape):
            raise PlanError("format", f"mnn: {problem}")
        if options.embedding_bits and shape.hidden_size % BLOCK:
            raise PlanError("embedding_bits", f"mnn: {shape.hidden_size} inputs do not divide by {BLOCK}")

    def check_model(self, shape: ModelShape, config: Any, folder: Path) -> None:
        """Whether the graph computes what the config says, and the engine reads text as the tokenizer does."""
        if problem := config_problem(config):
            raise UserError(f"{folder / 'config.json'}: {problem}: it cannot be exported to MNN.")
        if has_tokenizer(folder):  # a hub model's may not be downloaded yet
            require_same_ids(load_tokenizer(folder), folder)

    def warnings(self, shape: ModelShape, options: ExportOptions) -> list[str]:
        """Nothing: the engine that proves the files is what converts the graph."""
        return []

    def nbytes(self, shape: ModelShape, options: ExportOptions) -> int:
        """Tensors, the graph, and the tokenizer by a generous guess."""
        tensors = sum(size for _, _, size in stored_bytes(shape, options.embedding_bits))
        return tensors + graph_bytes(shape) + 80 * shape.vocab_size

    def memory(self, shape: ModelShape, options: ExportOptions) -> int:
        """The largest matrix with what packing it takes, or the engine with the whole model."""
        engine = engine_bytes(shape, options.embedding_bits) + ENGINE_LOGITS * row_bytes(shape)
        return max(writing_bytes(shape, options.embedding_bits), engine)

    def file(self, job: ExportJob) -> Path:
        """The graph."""
        return job.folder / GRAPH

    def files(self, job: ExportJob) -> list[Path]:
        """The graph, and all beside it."""
        return [job.folder / name for name in FILES if (job.folder / name).exists()]

    def write(self, job: ExportJob) -> Exactness:
        """Write the files beside, and move them where they belong, the graph last."""
        checkpoint, made = job.checkpoint, job.work / "mnn"
        question = {
            "checkpoint": str(checkpoint.folder.absolute()),
            "family": checkpoint.family.model_dump(mode="json"),
            "embedding_bits": job.options.embedding_bits,
            "output": str(made.absolute()),
        }
        size = self.nbytes(checkpoint.shape, job.options)
        with job.runtime.progress.task(f"writing {GRAPH}", total=size, unit="B") as advance:
            try:
                rounded = ask_engine(mnn_builder.__name__, question)
            except EngineError as error:
                raise UserError(f"{checkpoint.folder}: MNN's converter does not take it: {error}.") from None
            advance(size)
        checkpoint.require_unchanged()
        for name in FILES:
            if (made / name).exists():
                (made / name).replace(job.folder / name)
        rmtree(made)  # what the converter left
        exactness = Exactness()
        for name, kind, rounding in rounded:
            exactness.add(name, kind, Rounding(**rounding))
        return exactness

    def longest(self, checkpoint: Checkpoint) -> int:
        """All that the model reads: angles are computed, and windows are masks."""
        return checkpoint.model_config.max_position_embeddings

    def predict(self, job: ExportJob, rows: ProofRows) -> EnginePrediction:
        """The engine's logits in its exact mode, which becomes the default where that of low memory is far from it."""
        found = predicted(mnn_engine.__name__, {"folder": str(job.folder.absolute())}, job.work, rows)
        divergence = found.measured["low_memory_kl_divergence"]
        note = job.runtime.progress.note
        note(f"{GRAPH}: memory low is a KL divergence of {divergence:.2g} nats from memory high")
        if not divergence <= LOW_MEMORY:
            note(f"warning: {GRAPH}: that is more than {LOW_MEMORY:g}, so {SETTINGS} has memory high, which is slower")
            settings = job.folder / SETTINGS
            write_json(settings, read_object(settings) | {"memory": "high", "precision": "high"})
        return found

    def prove_towers(self, job: ExportJob) -> dict[str, Any]:
        """Nothing: text models are exported alone."""
        return {}

    def limits(self, shape: ModelShape, options: ExportOptions) -> Limits:
        """By what is rounded."""
        if options.embedding_bits is not None:
            return ROUNDED_ENDS
        return EXACT if shape.dtype == "bfloat16" else ROUNDED

    def details(self, job: ExportJob) -> dict[str, Any]:
        """Bytes by type, the context, and what to know."""
        sizes = Counter[str]()
        for _, kind, size in stored_bytes(job.checkpoint.shape, job.options.embedding_bits):
            sizes[kind] += size
        found = {"bytes_by_type": dict(sizes), "context_length": self.longest(job.checkpoint)}
        notes = reading_problems(job.checkpoint.tokenizer(), job.folder)
        return found | ({"notes": notes} if notes else {})

    def commands(self, file: str) -> str:
        """Python, a computer, phones."""
        return commands()

    def beside(self, file: str) -> dict[str, str]:
        """Nothing: all of it is written with the model."""
        return {}
