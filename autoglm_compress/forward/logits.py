"""From normalised final states to logits, for heads too large to convert at once."""

import torch

from autoglm_compress.slices import row_slices

LOGITS_AT_ONCE = 2**25
"""Elements of [tokens, vocab_size] in one slice: 128 MiB in fp32. A few such tensors exist at once."""

COMPARED = 4
"""Two models are compared on this many times smaller slices of tokens: more tensors of logits are in memory at once."""


def logits_of(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab_size] in the states' dtype, the head converted a slice of rows at a time."""
    logits = states.new_empty(len(states), len(head))
    for rows in row_slices(len(head)):
        torch.mm(states, head[rows].to(states).T, out=logits[:, rows])
    return logits


def logits_memory(tokens: int, vocab_size: int) -> int:
    """Bytes of the fp32 logits that a loss takes at once: two distributions, and one on the way there."""
    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    return 3 * 4 * min(tokens, at_once) * vocab_size


def token_slices(tokens: int, vocab_size: int) -> list[slice]:
    """Slices of tokens whose logits are LOGITS_AT_ONCE at most, and of one token at least."""
    chunk = max(1, LOGITS_AT_ONCE // vocab_size)
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def compared_slices(tokens: int, vocab_size: int) -> list[slice]:
    """Slices of tokens whose logits two models are compared on."""
    return token_slices(tokens, COMPARED * vocab_size)


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab_size] without their mean over the vocabulary, which no prediction depends on."""
    return logits - logits.mean(-1, keepdim=True)


def divergences(expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """KL(expected || found) in nats [tokens], of logits [tokens, vocab_size], computed in a dtype or their own."""
    ours, theirs = expected.log_softmax(-1, dtype), found.log_softmax(-1, dtype)
    return (ours.exp() * (ours - theirs)).sum(-1)
