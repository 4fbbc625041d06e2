"""Perplexity on rows of tokens, and on the answers of chats."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from autoglm_compress.calibration.answers import Exchange, predicted
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from autoglm_compress.hashing import hash_of

Pairs = list[tuple[list[int], list[int]]]
"""Token ids that a model reads, and those it is asked to predict after them."""


def perplexity(lm: LayerwiseLM, rows: torch.Tensor) -> dict[str, Any]:
    """Perplexity per token: exp of the mean negative log-likelihood of all tokens but the first of each row.

    The first token of a row has nothing before it to be predicted from; a row [sequence_length] therefore counts
    sequence_length - 1 tokens.

    Args:
        lm: the model.
        rows: token ids [samples, sequence_length], sequence_length at least 2.

    Returns:
        As `perplexity_of` has it; `text` is a hash of the token ids.
    """
    return perplexity_of(lm, [(row[:1], row[1:]) for row in rows.tolist()], hash_of_rows(rows))


def pairs_of(lm: LayerwiseLM, rows: Sequence[Exchange]) -> tuple[Pairs, str]:
    """Prompts and answers of chats as tokens, and a hash of all that the model reads."""
    pairs = [predicted(lm.reader, row, lm.max_length) for row in rows]
    return pairs, hash_of(json.dumps([pairs, lm.reader.key]))


def perplexity_of(lm: LayerwiseLM, pairs: Pairs, text: str) -> dict[str, Any]:
    """Perplexity of continuations, each of which counts alike, however long it is.

    Args:
        lm: the model.
        pairs: contexts and continuations.
        text: a hash of them.

    Returns:
        `value`, `stderr` (the spread between rows, carried through exp; None for a single row), `tokens` scored,
        `text`, and `rows`, the mean negative log-likelihood of each row in nats per token.
    """
    lengths = torch.tensor([len(continuation) for _, continuation in pairs])
    scores = lm.score(pairs)
    per_token = torch.tensor([-value for value, _ in scores], dtype=torch.float64) / lengths
    value = float(per_token.mean().exp())
    stderr = value * float(per_token.std()) / math.sqrt(len(per_token)) if len(per_token) > 1 else None
    return {
        "value": value,
        "stderr": stderr,
        "tokens": int(lengths.sum()),
        "text": text,
        "rows": per_token.tolist(),
    }


def hash_of_rows(rows: torch.Tensor) -> str:
    """A hash of token ids [samples, sequence_length]."""
    return hash_of(json.dumps(rows.tolist()))
