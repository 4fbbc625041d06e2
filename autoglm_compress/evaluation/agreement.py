"""How closely one checkpoint's predictions follow another's."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.features import counted
from autoglm_compress.forward.logits import centred, compared_slices, divergences, logits_of
from autoglm_compress.forward.one_layer_model import final_norm
from autoglm_compress.forward.walk import walk
from autoglm_compress.runtime import Runtime


@dataclass(frozen=True)
class Agreement:
    """How close the next-token distributions of two checkpoints are, over `tokens` tokens.

    `divergence` is the mean of KL(original || other) in nats, NaN where that is undefined. `logit_error` is the squared
    difference of the logits relative to the original's, both without their mean over the vocabulary: a value of 1 is no
    closer than equal logits for all tokens. `top1` is the share of tokens for which both find the same next token
    likeliest. `row_divergence` and `row_top1` are the first and the last of each row.
    """

    divergence: float
    logit_error: float
    top1: float
    tokens: int
    row_divergence: tuple[float, ...]
    row_top1: tuple[float, ...]


@torch.no_grad()
def agreement(
    original: Checkpoint,
    other: Checkpoint,
    batches: list[torch.Tensor],
    runtime: Runtime,
    work: Path | None = None,
) -> Agreement:
    """Compare the next-token distributions of two checkpoints of one vocabulary.

    Args:
        original: the reference checkpoint.
        other: the checkpoint to measure.
        batches: token ids [rows, length], of one length.
        runtime: where to compute.
        work: a folder for these checkpoints and batches alone, from which killed walks continue; None for no folder.
    """
    checkpoints, titles = (original, other), ("reference for the check", "check")
    folders = (None, None) if work is None else (work / "original", work / "other")
    states = [
        [last.clone() for last in walk(checkpoint, batches, None, runtime=runtime.alone(), title=title, folder=folder)]
        for checkpoint, title, folder in zip(checkpoints, titles, folders, strict=True)
    ]
    device = runtime.device
    norms = [final_norm(checkpoint, device) for checkpoint in checkpoints]
    heads = [checkpoint.head_weight().to(device) for checkpoint in checkpoints]
    if torch.equal(*heads):
        heads[1] = heads[0]
    difference, size, tokens = 0.0, 0.0, 0
    row_divergence, row_top1 = [], []
    for batch, *pair in zip(batches, *states, strict=True):
        divergence, same = [], []
        counts = counted(batch, len(heads[0]))
        normed = [norm(last.to(device))[counts.to(device)].float() for norm, last in zip(norms, pair, strict=True)]
        for part in compared_slices(len(normed[0]), len(heads[0])):
            logits = _logits([hidden[part] for hidden in normed], heads)
            expected, found = map(centred, logits)
            difference += float((found - expected).square().sum())
            size += float(expected.square().sum())
            del expected, found
            divergence.append(divergences(logits[0], logits[1]))
            same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
            del logits  # or they would be there beside the next ones
        per_row = counts.sum(1).tolist()
        tokens += sum(per_row)
        row_divergence += [float(row.double().mean()) for row in torch.cat(divergence).split(per_row)]
        row_top1 += [float(row.double().mean()) for row in torch.cat(same).split(per_row)]
    return Agreement(
        divergence=max(fmean(row_divergence), 0.0),  # rounding may give a negative value; NaN stays
        logit_error=difference / max(size, 1e-30),
        top1=fmean(row_top1),
        tokens=tokens,
        row_divergence=tuple(row_divergence),
        row_top1=tuple(row_top1),
    )


def _logits(states: list[torch.Tensor], heads: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of each checkpoint. A shared head is converted once for both."""
    if heads[0] is heads[1]:
        return list(logits_of(torch.cat(states), heads[0]).split(len(states[0])))
    return [logits_of(hidden, head) for hidden, head in zip(states, heads, strict=True)]
