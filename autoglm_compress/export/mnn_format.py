"""MNN, whose `llm` engine runs on phones."""

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.export import mnn_builder, mnn_engine
from autoglm_compress.export.engine_process import EngineError, ask_engine, has_package
from autoglm_compress.export.exactness import Exactness, Rounding
from autoglm_compress.export.job import ExportJob
from autoglm_compress.export.mnn_check import require_same_ids
from autoglm_compress.export.mnn_families import config_problem, scheme_of, shape_problem
from autoglm_compress.export.mnn_names import FILES, GRAPH
from autoglm_compress.export.mnn_usage import commands
from autoglm_compress.export.options import ExportOptions
from autoglm_compress.export.proof import EnginePrediction, Limits, ProofRows

PACKAGES = ("MNN", "llmexport")
EXACT, ROUNDED = Limits(1e-5, 2e-5), Limits(1e-4, 2e-4)
"""For numbers that bf16 and fp16 hold alike, and for others."""
LOW_MEMORY = 1e-2
"""The largest KL divergence, in nats, from the engine's exact mode to the one that rounds activations to 8 bits."""
GRAPH_BYTES, LAYER_BYTES = 50_000, 40_000
"""Of the graph: without layers, and of each layer."""


class MnnFormat:
    """Files for MNN (see `ExportFormat`)."""

    name = "mnn"
    engine = "MNN"
    engine_package = "MNN"

    def check(self, shape: ModelShape, options: ExportOptions) -> None:
        """Whether there is a graph for the shape."""
        if missing := [name for name in PACKAGES if not has_package(name)]:
            raise PlanError("format", f"{', '.join(missing)}: not installed: pip install 'autoglm-compress[mnn]'")
        if problem := shape_problem(shape):
            raise PlanError("format", f"mnn: {problem}")
        if options.embedding_bits is not None:
            raise PlanError("embedding_bits", "mnn: embedding and head have 16 bits, or what the checkpoint has")

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
        """Tensors, the graph twice, as ONNX and as JSON beside it, and the tokenizer by a generous guess."""
        graph = GRAPH_BYTES + LAYER_BYTES * shape.num_hidden_layers
        return sum(size for _, size in _stored(shape)) + graph + 80 * shape.vocab_size

    def memory(self, shape: ModelShape, options: ExportOptions) -> int:
        """The largest matrix with what packing it takes, or the engine, whose exact mode has all linears in fp32."""
        largest = max(prod(size) for _, size in shape.tensors())
        linears = sum(prod(size) for name, size in shape.tensors() if name != shape.family.embedding)
        head = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
        return max(largest * (shape.element_bytes + 6), 4 * (linears + head) + self.nbytes(shape, options))

    def file(self, job: ExportJob) -> Path:
        """The graph."""
        return job.folder / GRAPH

    def files(self, job: ExportJob) -> list[Path]:
        """The graph, and all beside it."""
        return [job.folder / name for name in FILES]

    def write(self, job: ExportJob) -> Exactness:
        """Write the files beside, and move them where they belong, the graph last."""
        checkpoint, made = job.checkpoint, job.work / "mnn"
        family = checkpoint.family.model_dump(mode="json")
        question = {"checkpoint": str(checkpoint.folder.absolute()), "family": family, "output": str(made.absolute())}
        size = self.nbytes(checkpoint.shape, job.options)
        with job.runtime.progress.task(f"writing {GRAPH}", total=size, unit="B") as advance:
            try:
                rounded = ask_engine(mnn_builder.__name__, question)
            except EngineError as error:
                raise UserError(f"{checkpoint.folder}: MNN's converter does not take it: {error}.") from None
            advance(size)
        checkpoint.require_unchanged()
        for name in FILES:
            (made / name).replace(job.folder / name)
        exactness = Exactness()
        for name, rounding in rounded.items():
            exactness.add(name, "values", Rounding(**rounding))
        return exactness

    def longest(self, checkpoint: Checkpoint) -> int:
        """All that the model reads: angles are computed, and windows are masks."""
        return checkpoint.model_config.max_position_embeddings

    def predict(self, job: ExportJob, rows: ProofRows) -> EnginePrediction:
        """The engine's logits in its exact mode; that of low memory must be near to it."""
        logits = job.work / "logits.npy"
        question = {
            "folder": str(job.folder.absolute()),
            "rows": rows.tokens.tolist(),
            "continuation": rows.continuation,
            "logits": str(logits),
            "threads": torch.get_num_threads(),
        }
        found = ask_engine(mnn_engine.__name__, question)
        divergence = found["low_memory"]
        if not divergence <= LOW_MEMORY:
            raise EngineError(
                f"its mode of low memory is a KL divergence of {divergence:.3g} nats from its exact one, and at most "
                f"{LOW_MEMORY:g} is allowed"
            )
        job.runtime.progress.note(f"{GRAPH}: memory low is a KL divergence of {divergence:.2g} nats from memory high")
        return EnginePrediction(
            logits, found["continuations"], {"low_memory_kl_divergence": float(f"{divergence:.4g}")}
        )

    def limits(self, shape: ModelShape, options: ExportOptions) -> Limits:
        """The embedding is in bf16 and the head in fp16, if it is not quantized."""
        return EXACT if shape.dtype == "bfloat16" else ROUNDED

    def details(self, job: ExportJob) -> dict[str, Any]:
        """Bytes by type, and the context."""
        sizes: Counter[str] = Counter()
        for kind, size in _stored(job.checkpoint.shape):
            sizes[kind] += size
        return {"bytes_by_type": dict(sizes), "context_length": self.longest(job.checkpoint)}

    def commands(self, file: str) -> str:
        """Python, a computer, phones."""
        return commands()

    def beside(self, file: str) -> dict[str, str]:
        """Nothing: all of it is written with the model."""
        return {}


def _stored(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Type and bytes of every tensor as it is stored; a tied head is there twice."""
    for name, size in shape.tensors():
        scheme = scheme_of(shape, name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scheme is not None:
            group = size[1] if scheme.group_size == -1 else scheme.group_size
            alpha = 4 * size[0] * size[1] // group * (1 if scheme.symmetric else 2)
            yield f"INT{scheme.bits}", prod(size) * scheme.bits // 8 + alpha
        elif len(size) == 1:
            yield "FP32", 4 * size[0]
        else:
            yield "BF16" if name == shape.family.embedding else "FP16", 2 * prod(size)
    if shape.tie_word_embeddings:
        yield "FP16", 2 * shape.vocab_size * shape.hidden_size
