"""`export.json`: what an export is, how exact it is, and how near the engine comes to the checkpoint."""

from typing import Any

from pydantic import Field

from autoglm_compress.records.files import Record


class ProofRecord(Record):
    """How near an engine's predictions are to the checkpoint's.

    Mean KL divergence in nats, the relative squared error of logits, and the shares of tokens that both find likeliest:
    of all, and of the engine's continuation.
    """

    kl_divergence: float
    logit_error: float
    same_next_token: float
    same_greedy_token: float
    tokens: int


class ExportRecord(Record):
    """`export.json`.

    `file` is the one that the engine is given, `bytes` those of all files with tensors, by the type of the tensors in
    `bytes_by_type`. `rounded` counts what the format does not hold exactly. Without the engine, `verified` is False and
    there is no `proof`. `notes` are what a user should know.
    """

    format: str
    file: str
    bytes: int
    verified: bool
    bytes_by_type: dict[str, int]
    context_length: int
    rounded: dict[str, Any]
    embedding_bits: dict[str, Any] | None = None
    proof: ProofRecord | None = None
    notes: list[str] = Field(default_factory=list)
