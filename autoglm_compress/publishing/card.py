"""Model cards: the parts that the cards of checkpoints and of exports have in common, and the card of a checkpoint.

The Hugging Face hub reads the part between the first lines of dashes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.publishing.history import History, card_license
from autoglm_compress.records.metrics import Row
from autoglm_compress.records.stage import Shape
from autoglm_compress.report.chain import precision
from autoglm_compress.report.numbers import percent, plain, points, size, two_places

TAG = "autoglm-compress"


def written(metadata: Mapping[str, Any], title: str, parts: Sequence[str]) -> str:
    """A card, from what the hub is told and paragraphs in Markdown."""
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {title}\n\n" + "\n\n".join(parts) + "\n"


def origin(past: History | None) -> dict[str, str]:
    """What the hub is told of the source: it links to the base model."""
    if past is None:
        return {}
    found = {"base_model": past.base_model, "license": past.license}
    return {name: value for name, value in found.items() if value}


def facts(rows: Mapping[str, object]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def measured(row: Row, what: str) -> list[str]:
    """What a run measured of a checkpoint, as sentences, with the difference to the source."""
    lines = []
    if row.accuracy is not None:
        delta = row.accuracy_delta_source
        against = "" if delta is None else f", {points(delta)} to the source (percentage points)"
        lines.append(f"MMLU of {what}: {percent(row.accuracy)}{against}.")
    if row.perplexity is not None:
        delta = row.perplexity_delta_source
        before = None if delta is None else row.perplexity - delta
        against = f", {plain(row.perplexity / before)} × the source's" if before else ""
        lines.append(f"Perplexity of {what}: {two_places(row.perplexity)}{against}.")
    return lines


def past_parts(past: History | None) -> list[str]:
    """What each stage cost, and the recipe."""
    if past is None:
        return []
    heading, *rows = past.stages()
    lines = [heading, ["---"] * len(heading), *rows]
    recipe = yaml.safe_dump(past.recipe(), sort_keys=False, allow_unicode=True)
    return [
        "## What each stage cost",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        "## The recipe",
        f"Made with {TAG}:\n\n```yaml\n{recipe}```",
    ]


def checkpoint_card(checkpoint: Checkpoint, repo: str, past: History | None) -> str:
    """The card of a checkpoint that `transformers` loads.

    Args:
        checkpoint: the checkpoint.
        repo: its id on the hub, OWNER/NAME.
        past: what its run knows of it, if it is of one.
    """
    shape, found = checkpoint.shape, Shape.of(checkpoint.shape)
    metadata: dict[str, Any] = {"library_name": "transformers"} | origin(past)
    if past is None and (license_ := card_license(checkpoint.folder)):
        metadata["license"] = license_
    tags = [TAG]
    if found.quantization is not None:
        if "base_model" in metadata:
            metadata["base_model_relation"] = "quantized"
        tags.append(found.quantization["format"])
    kind = checkpoint.family.auto_class
    if kind == "AutoModelForCausalLM":
        metadata["pipeline_tag"] = "text-generation"
    weights = sum(file.stat().st_size for file in checkpoint.files())
    parts = [
        facts(
            {
                "parameters": f"{shape.parameters:,}",
                "weights": f"{size(weights)}, {precision(found)}",
                "layers": f"{shape.num_hidden_layers}, {shape.hidden_size} wide",
                "architecture": shape.family.architecture,
            }
        ),
        f'```python\nfrom transformers import {kind}, AutoTokenizer\n\nmodel = {kind}.from_pretrained("{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```',
        *(measured(past.row, "this checkpoint") if past else ()),
        *past_parts(past),
    ]
    return written(metadata | {"tags": tags}, repo.rpartition("/")[2], parts)
