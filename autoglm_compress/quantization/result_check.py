"""The check of a quantized checkpoint: whether its predictions follow those of the checkpoint before it."""

from pathlib import Path
from typing import Any

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.forward.features import with_features_of
from autoglm_compress.runtime import Runtime


def measure_agreement(source: Checkpoint, made: Path, rows: list[torch.Tensor], runtime: Runtime) -> dict[str, Any]:
    """How close the predictions of the checkpoint in `made` are to the source's, as data for `stage.json`.

    Args:
        rows: token ids [rows, length] of text that nothing was fitted to.
    """
    result = with_features_of(Checkpoint(made, source.family), source)
    found = agreement(source, result, rows, runtime)
    return {
        "kl_divergence": float(f"{found.divergence:.4g}"),
        "logit_error": float(f"{found.logit_error:.4g}"),
        "same_next_token": float(f"{found.top1:.4g}"),
        "held_out_tokens": found.tokens,
    }


def require_agreement(found: dict[str, Any], most: float, label: str, source: Path) -> None:
    """Raise UserError if the recorded predictions are more than `most` nats from those of the checkpoint in the
    source's folder.

    `label` is the stage's name for the user.
    """
    divergence, error = found["kl_divergence"], found["logit_error"]
    # If the predictions are nearly flat, the divergence is small in any case, so the logits are checked too.
    if not (divergence <= most and error < 1):
        raise UserError(
            f"stage {label}: the quantized checkpoint does not predict what {source} does: mean KL divergence "
            f"{divergence:.3g} nats over {found['held_out_tokens']} held-out tokens (at most "
            f"{most:g} is allowed), {100 * error:.0f} % squared error of the logits, the same next "
            f"token for {100 * found['same_next_token']:.0f} %. Use more bits, a smaller group_size or more "
            "calibration.samples; a higher max_divergence lets it pass if that is what you want."
        )
