"""Text that the teacher writes itself: healing without any data."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress

ROWS_AT_ONCE = 64


@torch.no_grad()
def sample_rows(
    model: Any, start: int | None, rows: int, length: int, seed: int, folder: Path, progress: Progress
) -> torch.Tensor:
    """Rows [rows, length] drawn from a model's own distribution, each from the token that ends a text on.

    A text that ends within a row is followed by another, as in rows packed from documents. What is in `folder` from a
    run that was killed is used again.

    Raises:
        UserError: the tokenizer has no token that starts or ends a text.
    """
    if start is None:
        raise UserError("data: teacher_samples: the tokenizer has no bos_token and no eos_token to begin a text with.")
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with progress.task("teacher writes text", total=rows * length, unit="tokens") as advance:
        for number, first in enumerate(range(0, rows, ROWS_AT_ONCE)):
            count = min(ROWS_AT_ONCE, rows - first)
            file = folder / f"samples-{number:05d}.safetensors"
            if not file.exists():
                torch.manual_seed(seed + number)
                save_atomically(file, {"rows": _sample(model, start, count, length).to(torch.int32).cpu()})
            found.append(load_file(file)["rows"])
            advance(count * length)
    return torch.cat(found)


def _sample(model: Any, start: int, rows: int, length: int) -> torch.Tensor:
    prompt = torch.full((rows, 1), start, device=model.device)
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=start,
    )
