"""The proof of an export: what the engine predicts from the file, beside what the checkpoint predicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.export.engine_process import ask_engine
from autoglm_compress.export.exact_checkpoint import ExactCheckpoint
from autoglm_compress.forward.logits import LOGITS_AT_ONCE, centred, compared_slices, divergences, logits_of
from autoglm_compress.forward.one_layer_model import final_norm
from autoglm_compress.forward.walk import walk
from autoglm_compress.runtime import Runtime

ROWS, LENGTH, CONTINUATION = 4, 96, 16
"""Rows of held-out text, tokens of each, and tokens that each is continued with."""
ENGINE_LOGITS = 2
"""How often an engine has the logits of a row: where they are computed, and where they are asked for."""


@dataclass(frozen=True)
class ProofRows:
    """Token ids [rows, tokens] to compare on, and how many tokens each row is continued with."""

    tokens: torch.Tensor
    continuation: int


@dataclass(frozen=True)
class EnginePrediction:
    """What an engine makes of rows of tokens.

    `logits` is a file of numpy, fp32 [rows, tokens + continuation, vocab_size]; `continuations` are the tokens that the
    engine continues each row with greedily, [rows, continuation].
    """

    logits: Path
    continuations: list[list[int]]


def predicted(module: str, model: Mapping[str, str], work: Path, rows: ProofRows) -> EnginePrediction:
    """What an engine makes of rows, in a process of its own.

    Args:
        module: the module of this package that runs the engine.
        model: where the model is, in the module's words.
        work: the folder for the logits.
        rows: the rows.

    Raises:
        EngineError: the engine does not take the model.
    """
    logits = work / "logits.npy"
    question = {
        "rows": rows.tokens.tolist(),
        "continuation": rows.continuation,
        "logits": str(logits),
        "threads": torch.get_num_threads(),
    }
    return EnginePrediction(logits, ask_engine(module, {**model, **question}))


@dataclass(frozen=True)
class Limits:
    """How far an engine may be from the checkpoint: mean KL divergence in nats, relative squared error of logits."""

    divergence: float
    logit_error: float


@dataclass(frozen=True)
class Proof:
    """How near an engine's predictions are to the checkpoint's, over `positions` tokens.

    `top1` is the share of tokens for which both find the same next token likeliest, `greedy` the share of the engine's
    continuation that the checkpoint would have chosen too.
    """

    divergence: float
    logit_error: float
    top1: float
    greedy: float
    positions: int

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        found = {
            "kl_divergence": self.divergence,
            "logit_error": self.logit_error,
            "same_next_token": self.top1,
            "same_greedy_token": self.greedy,
        }
        return {name: float(f"{value:.4g}") for name, value in found.items()} | {"tokens": self.positions}

    def require(self, limits: Limits, engine: str, file: Path) -> None:
        """Raise UserError if it is further than the limits."""
        if self.divergence <= limits.divergence and self.logit_error <= limits.logit_error:
            return
        raise UserError(
            f"{file.name}: {engine} does not predict from it what the checkpoint predicts: mean KL divergence "
            f"{self.divergence:.3g} nats over {self.positions} tokens (at most {limits.divergence:g} is allowed), "
            f"{100 * self.logit_error:.3g} % squared error of the logits (at most {100 * limits.logit_error:g} %), the "
            f"same next token for {100 * self.top1:.0f} %. The export is broken and was not kept: report it."
        )


def proof_rows(held_out: list[torch.Tensor], longest: int) -> ProofRows:
    """What to compare on.

    Args:
        held_out: batches of token ids [rows, length] of text that nothing was fitted to.
        longest: how many tokens the engine reads as the checkpoint does.
    """
    rows = torch.cat(held_out)[:ROWS]
    continuation = max(1, min(CONTINUATION, longest // 4))
    return ProofRows(rows[:, : max(1, min(LENGTH, longest - continuation))], continuation)


def proof_scratch(shape: ModelShape) -> int:
    """Bytes of the engine's logits."""
    return ROWS * row_bytes(shape)


def row_bytes(shape: ModelShape) -> int:
    """Bytes of the engine's logits of a row."""
    return 4 * (LENGTH + CONTINUATION) * shape.vocab_size


def proof_memory(shape: ModelShape) -> int:
    """Bytes of memory that the proof takes in this process: a layer in fp32, the head, logits, an engine's row."""
    layer = max(map(shape.layer_elements, shape.kinds_of_layers))
    head = shape.element_bytes * shape.vocab_size * shape.hidden_size
    return 4 * layer + head + 12 * LOGITS_AT_ONCE + row_bytes(shape)


@torch.no_grad()
def prove(checkpoint: Checkpoint, rows: torch.Tensor, found: EnginePrediction, runtime: Runtime) -> Proof:
    """Compare an engine's predictions with a checkpoint's, one layer of which is in memory at a time.

    Args:
        checkpoint: what the engine's file was made from.
        rows: token ids [rows, tokens] that the engine was given.
        found: what it made of them.
        runtime: where to compute.
    """
    whole = torch.cat([rows, torch.tensor(found.continuations)], dim=1)
    shape = np.load(found.logits, mmap_mode="r").shape
    if shape != (*whole.shape, checkpoint.shape.vocab_size):
        raise UserError(f"{found.logits.name}: logits of shape {shape}: the engine has another vocabulary.")
    exact = ExactCheckpoint(checkpoint.folder, checkpoint.family)
    norm, head = final_norm(exact, runtime.device), exact.head_weight().to(runtime.device)
    states = next(walk(exact, [whole], None, runtime=runtime.alone(), title="reference for the proof"))
    normed = norm(states.to(runtime.device)).float()
    divergence, difference, size, same = 0.0, 0.0, 0.0, []
    for row in range(len(whole)):
        engine = np.load(found.logits, mmap_mode="r")  # anew: pages that were read stay with a map
        for part in compared_slices(whole.shape[1], len(head)):
            expected = logits_of(normed[row, part], head)
            given = torch.from_numpy(np.array(engine[row, part])).to(expected)
            same.append(torch.stack([expected.argmax(-1), given.argmax(-1)]).cpu())
            divergence += float(divergences(expected, given, torch.float64).sum())
            expected, given = centred(expected), centred(given)
            difference += float((given - expected).double().square().sum())
            size += float(expected.double().square().sum())
    chosen = torch.cat(same, dim=1).view(2, *whole.shape)
    before = slice(rows.shape[1] - 1, whole.shape[1] - 1)
    return Proof(
        divergence=max(divergence / whole.numel(), 0.0),  # rounding may leave less; NaN stays
        logit_error=difference / max(size, 1e-300),
        top1=float((chosen[0] == chosen[1]).double().mean()),
        greedy=float((chosen[0][:, before] == whole[:, rows.shape[1] :]).double().mean()),
        positions=whole.numel(),
    )
