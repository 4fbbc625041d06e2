"""Whether what this package makes of a folder has the logits that plain transformers has of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.checkpoint.described import describe
from autoglm_compress.checkpoint.plain_verdict import require_loadable
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from autoglm_compress.forward.whole_model import load_model
from support.quiet import CPU, quiet

PASS, REFUSED, UNLOADED, WRONG = "pass", "refused", "transformers refuses", "wrong"
TOLERANCE = 1e-3
"""Nats, and logits as a share of the largest, between two orders of the same sums in fp32."""


@dataclass(frozen=True)
class Outcome:
    """What became of a folder: PASS, REFUSED (by a UserError), UNLOADED (by transformers either) or WRONG, and why."""

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Plain:
    """A folder in plain transformers, in fp32, and the tensors that it looked for in vain."""

    model: torch.nn.Module
    missing: tuple[str, ...]


def plain_model(folder: Path, dtype: Any = torch.float32) -> Plain:
    """The folder's model; whatever transformers raises comes through."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    return Plain(model.eval(), tuple(sorted(info["missing_keys"])))


def rows(vocab_size: int, context: int) -> list[list[int]]:
    """Rows of tokens of several lengths: two begin alike, one is the beginning of another, and one stands alone."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, vocab_size, (context,), generator=generator).tolist()
    second = [*first[: context - 7], *reversed(first[-6:])]
    alone = torch.randint(0, vocab_size, (context // 3,), generator=generator).tolist()
    return [first, second, first[: context // 4], alone]


@torch.no_grad()
def all_logits(model: torch.nn.Module, tokens: list[list[int]]) -> list[torch.Tensor]:
    """Logits [length, vocab] of each row, alone."""
    return [model(torch.tensor([row]), use_cache=False).logits[0].float() for row in tokens]


def identity(source: Checkpoint, folder: Path) -> Path:
    """The checkpoint read and written by what every structural stage uses, with nothing changed."""
    layers = source.shape.num_hidden_layers
    target = CheckpointWriter(folder, layers + 2)
    Rewrite(range(layers), {}, lambda _: {}).run(source, target, source.shape, quiet().progress)
    return folder


def outcome(folder: Path, work: Path, context: int) -> Outcome:
    """What plain transformers and this package make of a folder with a tokenizer; `work` is an empty folder."""
    try:
        plain = plain_model(folder)
        tokens = rows(plain.model.config.vocab_size, context)
        expected = all_logits(plain.model, tokens)
    except Exception as error:  # of many kinds
        return Outcome(UNLOADED, f"{_ours(folder, work)}; transformers: {type(error).__name__}: {error}")
    try:
        source = Checkpoint(folder)
        require_loadable(source)
        describe(folder)
    except UserError as error:
        return Outcome(REFUSED, str(error).replace(str(folder), "FOLDER"))
    if plain.missing:
        return Outcome(WRONG, f"taken, though transformers misses {', '.join(plain.missing)}")
    try:
        return _compared(source, plain, tokens, expected, work)
    except UserError as error:
        return Outcome(WRONG, f"refused only when work has begun: {error}")


def _ours(folder: Path, work: Path) -> str:
    """What this package does with a folder that transformers does not run; anything but a refusal is raised."""
    try:
        source = Checkpoint(folder)
        require_loadable(source)
        describe(folder)
        identity(source, work / "identity")
        LayerwiseLM(source, runtime=quiet(), title="evaluate").score([([0], [1])])
    except UserError:
        return "refused"
    return "taken"


def _compared(
    source: Checkpoint, plain: Plain, tokens: list[list[int]], expected: list[torch.Tensor], work: Path
) -> Outcome:
    """The logits of every way through a model that this package has, against those of plain transformers."""
    if describe(source.folder).shape != source.shape:
        return Outcome(WRONG, f"planned as {describe(source.folder).shape}, is {source.shape}")
    written = plain_model(identity(source, work / "identity"))
    found = all_logits(written.model, tokens)
    if written.missing or not all(map(torch.equal, found, expected)):
        return Outcome(WRONG, f"the identity's logits are off by {_error(found, expected):.2g}")
    one, other = (plain_model(path, "auto").model.dtype for path in (source.folder, work / "identity"))
    if one != other:
        return Outcome(WRONG, f"the identity loads as {other}, the source as {one}")
    found = all_logits(load_model(source, CPU, torch.float32), tokens)
    if _error(found, expected) > TOLERANCE:
        return Outcome(WRONG, f"the whole model's logits are off by {_error(found, expected):.2g}")
    pairs = [(row[:1], row[1:]) for row in tokens] + [(row[:-2], row[-2:]) for row in tokens]
    scores = LayerwiseLM(source, runtime=quiet(), title="evaluate").score(pairs)
    for (value, _), (begin, end), logits in zip(scores, pairs, expected * 2, strict=True):
        places = torch.arange(len(begin) - 1, len(begin) + len(end) - 1)
        right = float(logits.log_softmax(-1)[places, torch.tensor(end)].sum())
        if abs(value - right) > TOLERANCE * max(1.0, abs(right)):
            return Outcome(WRONG, f"evaluate scores {value:.4f} where transformers has {right:.4f}")
    return Outcome(PASS)


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    largest = max(float(logits.abs().max()) for logits in expected)
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)) / largest
