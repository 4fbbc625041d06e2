"""The model that is trained, built from a checkpoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.fitting.next_token_loss import UNLABELLED, NextTokens, differentiable_loss
from autoglm_compress.forward.features import counted, decoder_inputs


class Student(nn.Module):
    """The model to heal, as a module whose forward pass is the loss, so that wrappers shard all of it."""

    def __init__(
        self, model: Any, source: Checkpoint, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """The model of a checkpoint, whose towers see and hear for it."""
        super().__init__()
        self.model, self.source = model, source
        self._autocast = autocast

    def forward(
        self,
        rows: torch.Tensor,
        target: NextTokens,
        label_share: float = 0.0,
        residual: float = 0.0,
        boundaries: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The mean loss of token ids [rows, length].

        Args:
            rows: token ids.
            target: the teacher's distributions after each of them, row by row.
            label_share: the share of the cross-entropy in the loss.
            residual: the weight of the residual stream's error.
            boundaries: for layers of the student, the residual stream that should go into them [rows, length, hidden].
        """
        head = self.model.get_output_embeddings().weight
        with self._autocast():
            inputs = decoder_inputs(self.source, self.model, rows)
            found = self.model.get_decoder()(**inputs, use_cache=False, output_hidden_states=bool(boundaries))
        labels, counts = nn.functional.pad(rows[:, 1:], (0, 1), value=UNLABELLED), counted(rows, len(head))
        loss = differentiable_loss(
            found.last_hidden_state[counts], head, target.at(counts.flatten()), labels[counts], label_share
        )
        boundaries = boundaries or {}
        for layer, wanted in boundaries.items():
            error = (found.hidden_states[layer].float() - wanted).square().mean(-1)
            loss = loss + residual / len(boundaries) * (error / wanted.square().mean(-1).clamp_min(1e-12)).mean()
        return loss


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, of which each process holds a part. All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor on a parameter's device. For a sharded parameter, this process's part of it."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
