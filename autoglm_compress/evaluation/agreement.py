"""Whether one checkpoint still predicts what another does."""

from dataclasses import dataclass

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.progress import Progress
from autoglm_compress.reconstruction.logits import logits_of, token_slices
from autoglm_compress.reconstruction.walk import final_norm, walk


@dataclass(frozen=True)
class Agreement:
    """Mean over tokens of KL(original's next-token distribution || the other's), in nats (NaN if that is undefined),
    the share of tokens for which both find the same next token likeliest, and how many tokens were asked about.
    """

    divergence: float
    top1: float
    tokens: int


@torch.no_grad()
def agreement(
    original: Checkpoint, other: Checkpoint, batches: list[torch.Tensor], device: torch.device, progress: Progress
) -> Agreement:
    """Compare the next-token distributions of two checkpoints of one vocabulary.

    Args:
        original: the checkpoint that is right.
        other: the checkpoint in question.
        batches: token ids [rows, length].
        device: where to compute.
        progress: shows the two walks.
    """
    checkpoints, titles = (original, other), ("reference for the check", "check")
    states = [
        [last.clone() for last in walk(checkpoint, batches, None, device=device, progress=progress, title=title)]
        for checkpoint, title in zip(checkpoints, titles, strict=True)
    ]
    norms = [final_norm(checkpoint, device) for checkpoint in checkpoints]
    heads = [checkpoint.head_weight().to(device) for checkpoint in checkpoints]
    divergence, same, tokens = 0.0, 0, 0
    for pair in zip(*states, strict=True):
        normed = [norm(last.to(device)).flatten(0, -2).float() for norm, last in zip(norms, pair, strict=True)]
        for part in token_slices(len(normed[0]), len(heads[0])):
            expected, found = (
                logits_of(hidden[part], head).log_softmax(-1) for hidden, head in zip(normed, heads, strict=True)
            )
            divergence += float((expected.exp() * (expected - found)).sum())
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(normed[0])
    return Agreement(divergence / tokens, same / tokens, tokens)
