"""ONNX graphs, which ONNX Runtime runs through onnxruntime-genai."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.tokenizer import has_tokenizer
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.export import onnx_engine
from autoglm_compress.export.eight_bits import EndsError
from autoglm_compress.export.engine_process import has_package
from autoglm_compress.export.exactness import Exactness, Rounding
from autoglm_compress.export.id_comparison import blanks_problem
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.onnx_check import chat_prompt_problem, compare_ids
from autoglm_compress.export.onnx_families import MOST_TOKENS, context_length, shape_problem
from autoglm_compress.export.onnx_names import DATA, GRAPH
from autoglm_compress.export.onnx_sizes import engine_bytes, graph_bytes, stored_bytes, writing_bytes
from autoglm_compress.export.onnx_usage import commands
from autoglm_compress.export.onnx_writer import write_onnx
from autoglm_compress.export.options import ExportOptions, accuracy_level
from autoglm_compress.export.own_graphs import config_problem
from autoglm_compress.export.proof import ENGINE_LOGITS, EnginePrediction, Limits, ProofRows, predicted, row_bytes

PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")
EXACT = Limits(1e-5, 2e-5)
ROUNDING = Limits(5e-3, 1e-2)
"""Where activations are rounded to 8 bits, or the ends of the model are."""


class OnnxFormat:
    """Files for onnxruntime-genai (see `ExportFormat`)."""

    name = "onnx"
    engine = "ONNX Runtime"
    engine_package = "onnxruntime_genai"

    def check(self, shape: ModelShape, options: ExportOptions) -> None:
        """Whether there is a graph for the shape, and kernels for its integers."""
        if missing := [name for name in PACKAGES if not has_package(name)]:
            names = ", ".join(missing)
            raise PlanError("format", f"{names}: not installed: pip install 'autoglm-compress[onnx]'")
        if problem := shape_problem(shape):
            raise PlanError("format", f"onnx: {problem}")
        try:
            list(stored_bytes(shape, options.embedding_bits))
        except ValueError as error:
            option = "embedding_bits" if isinstance(error, EndsError) else "format"
            raise PlanError(option, f"onnx: {error}") from None

    def check_model(self, shape: ModelShape, config: Any, folder: Path) -> None:
        """Whether the graph computes what the config says, and the engine reads text as the tokenizer does."""
        if problem := config_problem(config):
            raise UserError(f"{folder / 'config.json'}: {problem}: it cannot be exported to ONNX.")
        if has_tokenizer(folder):  # a hub model's may not be downloaded yet
            compare_ids(shape, folder)

    def warnings(self, shape: ModelShape, options: ExportOptions) -> list[str]:
        """Nothing: the engine that proves the files is what writes them."""
        return []

    def nbytes(self, shape: ModelShape, options: ExportOptions) -> int:
        """Tensors, RoPE's tables of the longest context, the graph, and the tokenizer by a generous guess."""
        tensors = sum(size for _, _, size in stored_bytes(shape, options.embedding_bits))
        return tensors + 4 * MOST_TOKENS * shape.head_dim + graph_bytes(shape) + 80 * shape.vocab_size

    def memory(self, shape: ModelShape, options: ExportOptions) -> int:
        """The largest matrix with what packing it takes, or the engine with the whole model."""
        tables = 4 * MOST_TOKENS * shape.head_dim
        engine = engine_bytes(shape, options.embedding_bits) + ENGINE_LOGITS * row_bytes(shape)
        return tables + max(writing_bytes(shape, options.embedding_bits), engine)

    def file(self, job: ExportJob) -> Path:
        """The graph."""
        return job.folder / GRAPH

    def files(self, job: ExportJob) -> list[Path]:
        """The graph, and its tensors."""
        return [job.folder / GRAPH, job.folder / DATA]

    def write(self, job: ExportJob) -> Exactness:
        """Write the files, which hold scales and plain numbers as they are."""
        checkpoint, exactness = job.checkpoint, Exactness()
        write_onnx(checkpoint, job.options, job.folder, job.runtime.progress)
        kinds = {name: kind for name, kind, _ in stored_bytes(checkpoint.shape, job.options.embedding_bits)}
        for name, size in checkpoint.shape.tensors():
            if name not in checkpoint.infos:
                groups = checkpoint.shape.schemes[name.removesuffix(".weight")].groups(size[1])
                exactness.add(name, "scales", Rounding(size[0] * groups, 0, 0.0))
            elif not kinds[name].startswith("INT"):
                exactness.add(name, "values", Rounding(prod(size), 0, 0.0))
        return exactness

    def longest(self, checkpoint: Checkpoint) -> int:
        """What RoPE's tables have room for."""
        return context_length(checkpoint.model_config)

    def predict(self, job: ExportJob, rows: ProofRows) -> EnginePrediction:
        """The engine's logits."""
        return predicted(onnx_engine.__name__, {"folder": str(job.folder)}, job.work, rows)

    def prove_towers(self, job: ExportJob) -> dict[str, Any]:
        """Nothing: text models are exported alone."""
        return {}

    def limits(self, shape: ModelShape, options: ExportOptions) -> Limits:
        """By what is rounded."""
        if options.embedding_bits is not None:
            return ROUNDING
        return ROUNDING if shape.quantization and accuracy_level(options) else EXACT

    def details(self, job: ExportJob) -> dict[str, Any]:
        """Bytes by type, the context, and what to know."""
        checkpoint, sizes = job.checkpoint, Counter[str]()
        for _, kind, size in stored_bytes(checkpoint.shape, job.options.embedding_bits):
            sizes[kind] += size
        longest, tokenizer = self.longest(checkpoint), checkpoint.tokenizer()
        found: dict[str, Any] = {"bytes_by_type": dict(sizes), "context_length": longest}
        if any(kind.startswith("INT") for kind in sizes):
            found["accuracy_level"] = accuracy_level(job.options)
        notes = []
        if longest < checkpoint.model_config.max_position_embeddings:
            given = checkpoint.model_config.max_position_embeddings
            notes.append(f"the context is {longest} of the model's {given} tokens, so that RoPE's tables stay small")
        if tokenizer("a", verbose=False)["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
            notes.append(
                "the tokenizer puts special tokens around a text by itself, and onnxruntime-genai does not: write "
                "them, as the chat template does"
            )
        compared = compare_ids(checkpoint.shape, checkpoint.folder)
        problems = (
            blanks_problem(compared, "onnxruntime-genai"),
            chat_prompt_problem(checkpoint.shape, tokenizer),
        )
        notes += [problem for problem in problems if problem]
        return found | ({"notes": notes} if notes else {})

    def commands(self, file: str) -> str:
        """Python, Android, iOS."""
        return commands()

    def beside(self, file: str) -> dict[str, str]:
        """Nothing: all of it is written with the model."""
        return {}
