"""`README.md` of an export: what it is, how to run it, what it was made from and how near it is to that."""

from typing import Any

from autoglm_compress.architecture import ModelShape
from autoglm_compress.errors import UserError
from autoglm_compress.export.formats import ExportFormat
from autoglm_compress.export.job import ExportJob
from autoglm_compress.publishing.card import TAG, facts, measured, origin, past_parts, written
from autoglm_compress.publishing.history import History, history
from autoglm_compress.report.numbers import size


def card(kind: ExportFormat, job: ExportJob, record: dict[str, Any]) -> str:
    """The card of an export whose record is known."""
    try:
        past = history(job.checkpoint.folder)
    except UserError:  # a damaged record of the run is no reason to lose an export
        past = None
    metadata: dict[str, Any] = origin(past)
    if "base_model" in metadata:
        metadata["base_model_relation"] = "quantized"
    parts = [
        _sizes(kind, job.checkpoint.shape, record),
        "## Running it",
        kind.commands(record["file"]).rstrip(),
        "## How near it is",
        *_nearness(kind, record, past),
        *past_parts(past),
    ]
    metadata |= {"pipeline_tag": "text-generation", "tags": [record["format"], TAG]}
    return written(metadata, f"{job.name}, {record['format'].upper()}", parts)


def _sizes(kind: ExportFormat, shape: ModelShape, record: dict[str, Any]) -> str:
    types = ", ".join(f"{name} {size(count)}" for name, count in record["bytes_by_type"].items())
    vision = record.get("vision_file")
    images = {"images": f"`{vision}`: `--mmproj {vision}` beside `-m`"} if vision else {}
    table = facts(
        {
            "file": f"`{record['file']}`",
            **images,
            "size": f"{size(record['bytes'])} ({types})",
            "parameters": f"{shape.parameters:,}",
            "layers": f"{shape.num_hidden_layers}, {shape.hidden_size} wide",
            "context": f"{record['context_length']} tokens",
            "engine": kind.engine,
        }
    )
    return f"{table}\n\n`SHA256SUMS` has the checksums: `sha256sum -c SHA256SUMS`."


def _nearness(kind: ExportFormat, record: dict[str, Any], past: History | None) -> list[str]:
    lines = [f"Against the checkpoint it was made from: {record['rounded']['summary']}."]
    if record["verified"]:
        proof = record["proof"]
        lines.append(
            f"{kind.engine} predicts from it what the checkpoint predicts within a mean KL divergence of "
            f"{proof['kl_divergence']:.2g} nats over {proof['tokens']} held-out tokens, with the same next token for "
            f"{100 * proof['same_next_token']:.1f} % of them."
        )
        if "low_memory_kl_divergence" in proof:
            lines.append(f"With memory low, it is {proof['low_memory_kl_divergence']:.2g} nats from that.")
    else:
        lines.append(f"It was **not proven** with {kind.engine}, which was not installed.")
    if "vision_proof" in record:
        seen = record["vision_proof"]
        lines.append(
            f"Of an image of {seen['tokens']} tokens it makes the checkpoint's features within a squared error of "
            f"{100 * seen['squared_error']:.2g} %."
        )
    if "embedding_bits" in record:
        cost = record["embedding_bits"]["kl_divergence"]
        lines.append(f"Embedding and head in 8 bits are a KL divergence of {cost:.2g} nats of that.")
    lines += [f"Note: {note}." for note in record.get("notes", ())]
    return lines + (measured(past.row, "that checkpoint") if past else [])
