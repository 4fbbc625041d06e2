"""Text that the teacher writes, starting from openings of other text."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.training_rows import TextPart
from autoglm_compress.checkpoint.writer import computed_once
from autoglm_compress.progress import Progress

CACHE_BYTES, MOST_ROWS = 2**31, 512
"""The most bytes of key-value cache for rows that are written at once, and the most rows."""
OPENING = 8
"""One token in this many is given from the text, so that samples have the subjects and formats of the text."""


@torch.no_grad()
def continued(
    model: Any, shape: ModelShape, parts: Sequence[TextPart], seed: int, folder: Path, progress: Progress
) -> list[TextPart]:
    """The wanted number of rows, each the opening of a source's row, continued by the model.

    Deciding rows are made in the same way, from openings of deciding rows.

    The model samples from its unchanged distribution, as in LLM-QAT (Liu et al. 2023). A text that ends within a row is
    followed by another, as in packed rows. The samples show what the model knows; the source's text may contain little
    of it. Files of a killed run in `folder` are reused.

    Args:
        model: a causal language model of transformers, or the text tower of a larger one.
        shape: its shape.
        parts: the text. If a source has few rows, an opening is continued several times.
        seed: seeds the sampling.
        folder: keeps the samples.
        progress: shows the number of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    length = parts[0].rows.shape[1]
    at_once = min(MOST_ROWS, max(1, CACHE_BYTES // shape.kv_cache_bytes(length)))
    found, number = [], 0
    total = sum(part.wanted + len(part.deciding) for part in parts) * length
    with progress.task("teacher writes text", total=total, unit="tokens") as advance:
        for part in parts:
            chosen = part.rows[torch.arange(part.wanted) % len(part.rows)]
            openings = torch.cat([chosen, part.deciding])[:, : max(1, length // OPENING)]
            written = []
            for some in openings.split(at_once):
                file = folder / f"written-{number:05d}.safetensors"
                kept = computed_once(file, partial(_continue, model, some, length, seed + number))
                written.append(kept["rows"])
                number += 1
                advance(written[-1].numel())
            rows = torch.cat(written)
            found.append(TextPart(rows[: part.wanted], part.wanted, rows[part.wanted :]))
    return found


def _continue(model: Any, openings: torch.Tensor, length: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    rows, cache = openings.long().to(head.weight.device), None
    given = rows
    for _ in range(length - rows.shape[1]):
        seen = decoder(input_ids=given, past_key_values=cache, use_cache=True)
        cache = seen.past_key_values
        given = torch.multinomial(head(seen.last_hidden_state[:, -1]).float().softmax(-1), 1)
        rows = torch.cat([rows, given], dim=1)
    return {"rows": rows.to(torch.int32).cpu()}
