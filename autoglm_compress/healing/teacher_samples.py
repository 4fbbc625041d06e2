"""Text that the teacher writes itself, from the openings of other text on."""

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
"""The key-value cache of the rows that are written at once takes so much at most, and they are so many."""
OPENING = 8
"""One in so many tokens of a row is given, so that what is written has the subjects and formats of the text."""


@torch.no_grad()
def continued(
    model: Any, shape: ModelShape, parts: Sequence[TextPart], seed: int, folder: Path, progress: Progress
) -> list[TextPart]:
    """Rows as many as are wanted, each the opening of one of a source's rows as the model goes on with it.

    So are the rows that decide, from the openings of rows that do.

    The model draws from its own distribution, as it is (LLM-QAT, Liu et al. 2023, does so too); a text that ends within
    a row is followed by another, as in rows packed from documents. So it tells what it knows, of which the source's
    own text may hold little. What is in `folder` from a run that was killed is used again.

    Args:
        model: a causal language model of transformers.
        shape: its shape.
        parts: the text; of a source with few rows, an opening is gone on with several times.
        seed: decides what is drawn.
        folder: keeps what was written.
        progress: shows how much was.
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
    openings = openings.long().to(model.device)
    rows = model.generate(
        input_ids=openings,
        attention_mask=torch.ones_like(openings),
        max_new_tokens=length - openings.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return {"rows": rows.to(torch.int32).cpu()}
