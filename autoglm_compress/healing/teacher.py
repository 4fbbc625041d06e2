"""The teacher's distributions: computed when needed, or kept on disk so that the teacher need not stay in memory."""

import shutil
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from autoglm_compress.calibration.tokens import batched
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.checkpoint.writer import save_atomically
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.fitting.next_token_loss import FromStates, Likeliest, NextTokens
from autoglm_compress.forward.features import decoder_inputs
from autoglm_compress.forward.logits import logits_of, token_slices
from autoglm_compress.forward.one_layer_model import fast_dtype, final_norm
from autoglm_compress.forward.walk import walk
from autoglm_compress.forward.whole_model import load_model
from autoglm_compress.runtime import Runtime

TOKENS_AT_ONCE = 2**18
"""Tokens for which the teacher's weights are read once. Their hidden states are on disk meanwhile."""


class Teacher(Protocol):
    """Answers for rows of tokens, by their numbers among all rows."""

    def ask(self, numbers: torch.Tensor, rows: torch.Tensor) -> tuple[NextTokens, dict[int, torch.Tensor]]:
        """Distributions after each token of rows [rows, length], and the residual stream at boundaries, if any."""


class ResidentTeacher:
    """A whole model in memory.

    With a `lineage`, it also gives the residual stream, in the student's basis, at the start of each of the student's
    layers but the first.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, lineage: Lineage | None) -> None:
        self._checkpoint = checkpoint
        self.model = load_model(checkpoint, device, fast_dtype(checkpoint, device)).requires_grad_(False)
        self._lineage = lineage

    @torch.no_grad()
    def ask(self, numbers: torch.Tensor, rows: torch.Tensor) -> tuple[NextTokens, dict[int, torch.Tensor]]:
        """Run the model."""
        lineage = self._lineage
        inputs = decoder_inputs(self._checkpoint, self.model, rows)
        found = self.model.get_decoder()(**inputs, use_cache=False, output_hidden_states=lineage is not None)
        target = FromStates(found.last_hidden_state.flatten(0, 1).float(), self.model.get_output_embeddings().weight)
        if lineage is None:
            return target, {}
        kept = enumerate(lineage.layers[1:], 1)
        return target, {ours: lineage.project(found.hidden_states[theirs].float()) for ours, theirs in kept}


class CachedTeacher:
    """The likeliest tokens after each token of all rows, on disk: `top_k` x 6 bytes for each.

    A walk makes them, a layer at a time, so the teacher never has to fit into memory. A continued run reuses existing
    files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: torch.Tensor,
        top_k: int,
        folder: Path,
        runtime: Runtime,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))
        files = [folder / f"likeliest-{number:05d}.safetensors" for number in range(len(parts))]
        for number, (part, file) in enumerate(zip(parts, files, strict=True), 1):
            if not file.exists():
                title = f"teacher, part {number} of {len(parts)}"
                save_atomically(file, _likeliest(checkpoint, part.long(), top_k, folder / "states", runtime, title))
        self._files, self._rows_in_file = files, len(parts[0])
        self._device = runtime.device

    def ask(self, numbers: torch.Tensor, rows: torch.Tensor) -> tuple[NextTokens, dict[int, torch.Tensor]]:
        """Read the rows from disk, because all rows may not fit into memory."""
        found = zip(*map(self._row, numbers.tolist()), strict=True)
        return Likeliest(*(torch.cat(part).to(self._device) for part in found)), {}

    def _row(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and scores [length, top_k] of a row."""
        file, index = divmod(number, self._rows_in_file)
        with safe_open(self._files[file], framework="pt") as tensors:
            tokens, scores = (tensors.get_slice(name)[index : index + 1][0] for name in ("tokens", "scores"))
        return tokens, scores


@torch.no_grad()
def _likeliest(
    checkpoint: Checkpoint,
    rows: torch.Tensor,
    top_k: int,
    folder: Path,
    runtime: Runtime,
    title: str,
) -> dict[str, torch.Tensor]:
    """The `top_k` likeliest tokens after each token of rows, and their log-probabilities, [rows, length, top_k]."""
    device = runtime.device
    dtype = fast_dtype(checkpoint, device)
    last = walk(checkpoint, batched(rows), None, runtime=runtime.alone(), title=title, folder=folder, dtype=dtype)
    norm, head = final_norm(checkpoint, device), checkpoint.head_weight().to(device)
    tokens, scores = [], []
    for hidden in last:
        states = norm(hidden.to(device).float()).flatten(0, 1)
        for part in token_slices(len(states), len(head)):
            found = logits_of(states[part], head).log_softmax(-1).topk(top_k)
            scores.append(found.values.to(torch.float16).cpu())
            tokens.append(found.indices.to(torch.int32).cpu())
    size = (*rows.shape, top_k)
    shutil.rmtree(folder)
    return {"tokens": torch.cat(tokens).view(size), "scores": torch.cat(scores).view(size)}
