"""From the last hidden states to log-probabilities, without a tensor of [positions, vocabulary]."""

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.costs import POSITION_SLICE, VOCAB_SLICE
from autoglm_compress.forward.one_layer_model import compute_dtype, final_norm


class OutputHead:
    """The final norm and the output matrix of a checkpoint.

    The vocabulary is gone through in slices with a running log-sum-exp, so that a large output matrix is converted to
    the computing dtype a slice at a time too.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = compute_dtype(checkpoint, device)
        self._norm = final_norm(checkpoint, device)

    def _to_compute(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)

    @torch.no_grad()
    def score(
        self, hidden: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of tokens, each at a position.

        Args:
            hidden: last hidden states before the final norm, [positions, hidden_size].
            positions: for each question the row of `hidden` that predicts the token, [questions].
            tokens: the token ids asked about, [questions].

        Returns:
            Log-probabilities in nats, fp32 [questions], and whether the token is the likeliest one, bool [questions].
        """
        count = hidden.shape[0]
        positions, tokens = positions.to(self._device), tokens.to(self._device)
        log_total = torch.full((count,), -torch.inf, device=self._device)
        best_logit = log_total.clone()
        best_token = torch.zeros(count, dtype=torch.long, device=self._device)
        logit = torch.empty(len(tokens), device=self._device)
        matrix = self._checkpoint.head_weight()
        for first in range(0, matrix.shape[0], VOCAB_SLICE):
            rows = self._to_compute(matrix[first : first + VOCAB_SLICE])
            for start in range(0, count, POSITION_SLICE):
                part = slice(start, min(start + POSITION_SLICE, count))
                logits = (self._norm(self._to_compute(hidden[part])) @ rows.T).float()
                log_total[part] = torch.logaddexp(log_total[part], logits.logsumexp(-1))
                highest, where = logits.max(-1)
                better = highest > best_logit[part]
                best_logit[part] = torch.where(better, highest, best_logit[part])
                best_token[part] = torch.where(better, where + first, best_token[part])
                here = (positions >= part.start) & (positions < part.stop)
                here &= (tokens >= first) & (tokens < first + rows.shape[0])
                logit[here] = logits[positions[here] - start, tokens[here] - first]
        return (logit - log_total[positions]).cpu(), (best_token[positions] == tokens).cpu()
