"""The divergence of next-token distributions from a checkpoint's own."""

from collections.abc import Iterator

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.one_layer_model import final_norm

VOCABULARY_SLICE = 4096
"""Logits of one slice: 2,048 x 4,096 x 4 bytes = 32 MiB."""


class Divergence:
    """Mean KL divergence, in nats, from a checkpoint's next-token distributions to those of other hidden states.

    Logits are computed in fp32, for a slice of the vocabulary at a time.
    """

    def __init__(self, checkpoint: Checkpoint, reference: torch.Tensor, device: torch.device) -> None:
        """The reference: last hidden states [..., hidden_size] before the final norm."""
        self._checkpoint = checkpoint
        self._device = device
        self._norm = final_norm(checkpoint, device)
        self._reference = self._normalised(reference)
        self._log_total = torch.full(self._reference.shape[:1], -torch.inf, device=device)
        for matrix in self._head():
            self._log_total = self._log_total.logaddexp((self._reference @ matrix.T).logsumexp(-1))

    def _normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._norm(hidden.to(self._device).flatten(0, -2)).float()

    def _head(self) -> Iterator[torch.Tensor]:
        return _slices(self._checkpoint, self._device)

    @torch.no_grad()
    def of(self, candidates: torch.Tensor) -> torch.Tensor:
        """KL(reference || candidate) of last hidden states [candidates, ..., hidden_size], fp64 [candidates]."""
        log_total = torch.full((len(candidates), len(self._log_total)), -torch.inf, device=self._device)
        expected = torch.zeros_like(log_total)
        for matrix in self._head():
            log_probability = self._reference @ matrix.T - self._log_total[:, None]
            probability = log_probability.exp()
            for number, hidden in enumerate(candidates):
                logits = self._normalised(hidden) @ matrix.T
                log_total[number] = log_total[number].logaddexp(logits.logsumexp(-1))
                expected[number] += (probability * (log_probability - logits)).sum(-1)
        return (expected + log_total).double().mean(-1)

    @torch.no_grad()
    def of_other(self, checkpoint: Checkpoint, hidden: torch.Tensor) -> float:
        """KL(reference || other) of another checkpoint's last hidden states, with its own norm and head."""
        states = final_norm(checkpoint, self._device)(hidden.to(self._device).flatten(0, -2)).float()
        log_total = torch.full_like(self._log_total, -torch.inf)
        expected = torch.zeros_like(log_total)
        for matrix, other in zip(self._head(), _slices(checkpoint, self._device), strict=True):
            log_probability = self._reference @ matrix.T - self._log_total[:, None]
            logits = states @ other.T
            log_total = log_total.logaddexp(logits.logsumexp(-1))
            expected += (log_probability.exp() * (log_probability - logits)).sum(-1)
        return float((expected + log_total).double().mean())


def _slices(checkpoint: Checkpoint, device: torch.device) -> Iterator[torch.Tensor]:
    """The output matrix in slices [VOCABULARY_SLICE, hidden_size]."""
    for rows in checkpoint.head_weight().split(VOCABULARY_SLICE):
        yield rows.to(device, torch.float32)
