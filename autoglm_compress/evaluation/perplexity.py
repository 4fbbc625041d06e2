"""Perplexity on rows of tokens."""

import json
import math
from typing import Any

import torch

from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from autoglm_compress.hashing import hash_of


def perplexity(lm: LayerwiseLM, rows: torch.Tensor) -> dict[str, Any]:
    """Perplexity per token: exp of the mean negative log-likelihood of all tokens but the first of each row.

    The first token of a row has nothing before it to be predicted from; a row [sequence_length] therefore counts
    sequence_length - 1 tokens.

    Args:
        lm: the model.
        rows: token ids [samples, sequence_length], sequence_length at least 2.

    Returns:
        `value`, `stderr` (the spread between rows, carried through exp; None for a single row), `tokens` scored,
        `text`, a hash of the token ids, and `rows`, the mean negative log-likelihood of each row in nats per token.
    """
    scores = lm.score([(row[:1], row[1:]) for row in rows.tolist()])
    per_token = torch.tensor([-value for value, _ in scores], dtype=torch.float64) / (rows.shape[1] - 1)
    value = float(per_token.mean().exp())
    stderr = value * float(per_token.std()) / math.sqrt(len(per_token)) if len(per_token) > 1 else None
    return {
        "value": value,
        "stderr": stderr,
        "tokens": rows.shape[0] * (rows.shape[1] - 1),
        "text": hash_of_rows(rows),
        "rows": per_token.tolist(),
    }


def hash_of_rows(rows: torch.Tensor) -> str:
    """A hash of token ids [samples, sequence_length]."""
    return hash_of(json.dumps(rows.tolist()))
