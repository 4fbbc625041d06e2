"""`README.md` of an export: what it is, how to run it, what it was made from and how near it is to that.

The Hugging Face hub reads the part between the first lines of dashes.
"""

from pathlib import Path
from typing import Any

import yaml

from autoglm_compress.architecture import ModelShape
from autoglm_compress.export.formats import ExportFormat
from autoglm_compress.export.job import ExportJob
from autoglm_compress.records.files import MANIFEST, METRICS, found
from autoglm_compress.records.manifest import Manifest
from autoglm_compress.records.metrics import Metrics, Row

CARD = "README.md"


def card(kind: ExportFormat, job: ExportJob, record: dict[str, Any]) -> str:
    """The card of an export whose record is known."""
    run = job.checkpoint.folder.parent
    manifest = found(Manifest, run / MANIFEST)
    recipe = manifest.recipe if manifest else {}
    parts = [
        f"# {job.name}, {record['format'].upper()}",
        _sizes(kind, job.checkpoint.shape, record),
        "## Running it",
        kind.commands(record["file"]).rstrip(),
        "## How near it is",
        _nearness(kind, record, _row(run, job.checkpoint.folder.name)),
    ]
    if recipe:
        parts += [
            "## The recipe",
            "Made with autoglm-compress:\n\n"
            f"```yaml\n{yaml.safe_dump(_given(recipe), sort_keys=False, allow_unicode=True)}```",
        ]
    return f"---\n{yaml.safe_dump(_metadata(record, recipe), sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _given(value: Any) -> Any:
    """Plain data without what is None."""
    if isinstance(value, dict):
        return {name: _given(entry) for name, entry in value.items() if entry is not None}
    return [_given(entry) for entry in value] if isinstance(value, list) else value


def _metadata(record: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What the hub is told: it links to the base model if the recipe names it as on the hub."""
    source = str(recipe.get("model", {}).get("source", ""))
    base = {"base_model": source} if source.count("/") == 1 and not source.startswith((".", "/", "~")) else {}
    return base | {"pipeline_tag": "text-generation", "tags": [record["format"], "autoglm-compress"]}


def _sizes(kind: ExportFormat, shape: ModelShape, record: dict[str, Any]) -> str:
    vision = record.get("vision_file")
    images = f"| images | `{vision}`: `--mmproj {vision}` beside `-m` |\n" if vision else ""
    types = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in record["bytes_by_type"].items())
    return (
        f"| | |\n|---|---|\n| file | `{record['file']}` |\n{images}"
        f"| size | {record['bytes'] / 1e6:,.1f} MB ({types}) |\n"
        f"| parameters | {shape.parameters:,} |\n| layers | {shape.num_hidden_layers}, {shape.hidden_size} wide |\n"
        f"| context | {record['context_length']} tokens |\n| engine | {kind.engine} |\n\n"
        "`SHA256SUMS` has the checksums: `sha256sum -c SHA256SUMS`."
    )


def _nearness(kind: ExportFormat, record: dict[str, Any], row: Row | None) -> str:
    lines = [f"Against the checkpoint it was made from: {record['rounded']['summary']}."]
    if record["verified"]:
        proof = record["proof"]
        lines.append(
            f"{kind.engine} predicts from it what the checkpoint predicts within a mean KL divergence of "
            f"{proof['kl_divergence']:.2g} nats over {proof['tokens']} held-out tokens, with the same next token for "
            f"{100 * proof['same_next_token']:.1f} % of them."
        )
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
    if row is not None and row.accuracy is not None:
        delta = "" if row.accuracy_delta_source is None else f", {100 * row.accuracy_delta_source:+.1f} to the source"
        lines.append(f"MMLU of that checkpoint: {100 * row.accuracy:.1f} %{delta} (percentage points).")
    if row is not None and row.perplexity is not None:
        lines.append(f"Perplexity of that checkpoint: {row.perplexity:.2f}.")
    return "\n\n".join(lines)


def _row(run: Path, name: str) -> Row | None:
    """What a run measured of the checkpoint."""
    metrics = found(Metrics, run / METRICS)
    return next((row for row in metrics.stages if row.name == name), None) if metrics else None
