"""Train the reference model: a 36-layer GLM of 10 M parameters, grown from a shallow one on two CPU cores.

    python reference_model/train.py --text-folder FOLDER [--text-folder FOLDER] --minutes 75

The model starts with 6 layers and is then deepened almost without changing what it computes: all layers but the
first are split into seven that each do a seventh of the work. Muon trains the layers' matrices, AdamW everything else;
weights and activations are bfloat16, the master copy is float32. The schedule is by wall clock, so the number of
steps depends on the machine: seeds and order of phases are fixed, the exact weights are not.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from muon import MasterOptimizer
from training_data import HINT_WEIGHT, LETTER_WEIGHT, LETTERS, Mixture, Subject, read_quiz, read_texts, train_tokenizer
from transformers import (
    AttentionInterface,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from autoglm_compress.calibration.python_docs import documents

TOKENS_PER_STEP = 4096
DECAY_SHARE = 0.35
MUON_RATE = 0.02
SEED = 20


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one depth and sequence length, until `until` of the time has passed."""

    until: float
    layers: int
    length: int
    shares: dict[str, float]
    copy_share: float
    hints: bool


PHASES = (
    Phase(0.10, 6, 256, {"docs": 0.30, "text": 0.10, "statements": 0.10, "quiz": 0.50}, 0.30, False),
    Phase(0.26, 6, 64, {"docs": 0.10, "statements": 0.10, "quiz": 0.80}, 0.60, True),
    Phase(0.31, 6, 256, {"docs": 0.42, "text": 0.15, "statements": 0.08, "quiz": 0.35}, 0.05, True),
    Phase(0.44, 6, 256, {"docs": 0.60, "text": 0.22, "statements": 0.03, "quiz": 0.15}, 0.0, True),
    Phase(0.93, 36, 256, {"docs": 0.42, "text": 0.38, "statements": 0.03, "quiz": 0.17}, 0.0, False),
    Phase(1.00, 36, 512, {"docs": 0.42, "text": 0.38, "statements": 0.03, "quiz": 0.17}, 0.0, False),
)


def configuration(layers: int, end: int) -> GlmConfig:
    """Return the model's configuration at some depth."""
    return GlmConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=None,
        dtype="bfloat16",
    )


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention as two batched products per group of heads: faster on a CPU for heads of 16 dimensions."""
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    flat = (query * scaling).reshape(batch * groups, heads // groups * length, size)
    key, value = key.reshape(batch * groups, length, size), value.reshape(batch * groups, length, size)
    scores = torch.bmm(flat, key.transpose(1, 2)).view(batch * groups, heads // groups, length, length)
    position = torch.arange(length)
    scores = scores.masked_fill(position[:, None] < position[None, :], float("-inf"))
    weights = scores.float().softmax(-1).to(query.dtype).view(batch * groups, -1, length)
    return torch.bmm(weights, value).view(batch, heads, length, size).transpose(1, 2), None


def prepare(family: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a freshly initialised bfloat16 model whose layers and loss are compiled."""
    AttentionInterface.register("grouped", grouped_attention)
    config._attn_implementation = "grouped"
    model = family(config).bfloat16()
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return model


def build(layers: int, end: int) -> GlmForCausalLM:
    """Return a fresh reference model of some depth."""
    return prepare(GlmForCausalLM, configuration(layers, end))


def grow(model: GlmForCausalLM, layers: int, end: int) -> GlmForCausalLM:
    """Deepen a model so that it computes nearly the same and every layer does a share of the work.

    The first layer, which turns embeddings into features, stays single. Each later one becomes several copies in a
    row whose output projections are divided by their number: the same change of the residual stream in small steps.
    """
    old = model.config.num_hidden_layers
    if old == layers:
        return model
    copies, rest = divmod(layers - 1, old - 1)
    if rest:
        raise ValueError(f"{old} layers cannot be split evenly into {layers}")
    deeper = build(layers, end)
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] != "layers":
            state[name] = tensor
            continue
        source = int(parts[2])
        count = copies if source else 1
        shrink = count if parts[-2] in ("o_proj", "down_proj") else 1
        for copy in range(count):
            parts[2] = str(1 + (source - 1) * copies + copy if source else 0)
            state[".".join(parts)] = tensor / shrink
    deeper.load_state_dict(state)
    return deeper


@torch.compile(dynamic=False)
def weighted_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean cross entropy and the unweighted losses of all positions."""
    logits = (hidden @ head.T).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    return (losses * weights).sum() / weights.sum(), losses.detach()


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Return the perplexity over windows of tokens, each predicted from its own beginning."""
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def quiz_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, quiz: list[Subject], per_subject: int | None = None
) -> dict[str, float]:
    """Return the five-shot accuracy by subject: the likeliest of the four letters after each prompt."""
    letters = [tokenizer.encode(f" {letter}")[0] for letter in LETTERS]
    accuracy = {}
    for subject in quiz:
        rows = subject.test[:per_subject]
        prompts = [tokenizer.encode(subject.shots() + row.prompt()) for row in rows]
        right = 0
        for at in range(0, len(rows), 8):
            chunk = prompts[at : at + 8]
            width = max(map(len, chunk))
            padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in chunk])
            logits = model(input_ids=padded, use_cache=False).logits
            for row, tokens, scores in zip(rows[at : at + 8], chunk, logits, strict=True):
                right += LETTERS[int(scores[len(tokens) - 1, letters].argmax())] == row.letter
        accuracy[subject.name] = right / len(rows)
    return accuracy


def held_out_windows(tokenizer: PreTrainedTokenizerFast, length: int = 512) -> torch.Tensor:
    """Return the held-out documents as consecutive windows, the end token between documents."""
    encoded = tokenizer(documents("held-out"))["input_ids"]
    stream = [token for tokens in encoded for token in [*tokens, tokenizer.eos_token_id]]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint for plain `from_pretrained`, replacing an earlier one in one move."""
    plain = type(model)(type(model.config).from_dict(model.config.to_dict())).bfloat16()
    plain.load_state_dict(model.state_dict())
    fresh, stale = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    plain.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


class Trainer:
    """Runs the phases against the clock, with checks, resumable saves and exports on the way."""

    phases = PHASES

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.work.mkdir(parents=True, exist_ok=True)
        self.quiz = read_quiz(options.quiz)
        texts = read_texts(options.text_folder)
        saved = options.work / "tokenizer"
        if options.resume and saved.exists():
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
        else:
            self.tokenizer = self.make_tokenizer(texts)
            self.tokenizer.save_pretrained(saved)
        self.mixture = Mixture(self.tokenizer, self.quiz, texts, SEED)
        self.held_out = held_out_windows(self.tokenizer)
        self.elapsed, self.step, self.tokens = 0.0, 0, 0
        self.log: list[dict[str, object]] = []

    def make_tokenizer(self, texts: list[str]) -> PreTrainedTokenizerFast:
        """Return the tokenizer of a new run."""
        return train_tokenizer(self.quiz, texts)

    def build(self, layers: int) -> PreTrainedModel:
        """Return a fresh model of some depth."""
        return build(layers, self.tokenizer.eos_token_id)

    def run(self) -> None:
        """Train until the time is over and export the result."""
        torch.manual_seed(SEED)
        end = self.tokenizer.eos_token_id
        state = self.options.work / "state.pt"
        if self.options.resume and state.exists():
            saved = torch.load(state)
            self.elapsed, self.step, self.tokens, self.log = (saved[k] for k in ("elapsed", "step", "tokens", "log"))
            model = self.build(saved["layers"])
            model.load_state_dict(saved["model"])
            self.mixture.rng.seed(SEED + self.step)
        else:
            model = self.build(self.phases[0].layers)
            if self.options.output:
                export(grow(model, self.phases[-1].layers, end), self.tokenizer, self.options.output)
        for phase in self.phases:
            if self.elapsed < phase.until * self.options.minutes * 60:
                if model.config.num_hidden_layers != phase.layers:
                    self._check(model)
                    model = grow(model, phase.layers, end)
                self._train(model, phase)
        self._check(model, complete=True)

    def _train(self, model: PreTrainedModel, phase: Phase) -> None:
        """Train through one phase."""
        total = self.options.minutes * 60
        optimizer = MasterOptimizer(model, muon_rate=MUON_RATE * math.sqrt(PHASES[0].layers / phase.layers))
        rows = TOKENS_PER_STEP // phase.length
        last, first_step, checked, logged = time.perf_counter(), self.step, self.elapsed, self.elapsed
        text_loss = letter_loss = hint_loss = 0.0
        while self.elapsed < phase.until * total:
            done = self.elapsed / total
            tokens, targets, weights = self.mixture.batch(
                rows, phase.length + 1, phase.shares, phase.copy_share, phase.hints
            )
            hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            loss, losses = weighted_loss(hidden, model.lm_head.weight, targets[:, 1:], weights[:, 1:])
            loss.backward()
            warm = min(1.0, (self.step - first_step + 1) / 25)
            optimizer.step(warm * min(1.0, (1.0 - done) / DECAY_SHARE))
            self.step += 1
            self.tokens += rows * phase.length
            plain, letter = losses[weights[:, 1:] == 1], losses[weights[:, 1:] == LETTER_WEIGHT]
            text_loss = 0.95 * text_loss + 0.05 * plain.mean().item() if text_loss else plain.mean().item()
            if letter.numel():
                letter_loss = 0.95 * letter_loss + 0.05 * letter.mean().item() if letter_loss else letter.mean().item()
            hint = losses[weights[:, 1:] == HINT_WEIGHT]
            if hint.numel():
                hint_loss = 0.95 * hint_loss + 0.05 * hint.mean().item() if hint_loss else hint.mean().item()
            now = time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            if self.elapsed - logged > 30:
                logged = self.elapsed
                print(
                    f"{self.elapsed:6.0f}s layers {phase.layers} step {self.step} tokens {self.tokens / 1e6:.2f}M "
                    f"text {text_loss:.3f} letter {letter_loss:.3f} hint {hint_loss:.3f}",
                    flush=True,
                )
            if self.elapsed - checked > self.options.check_seconds:
                self._check(model)
                now = time.perf_counter()
                self.elapsed, last = self.elapsed + now - last, now
                checked = self.elapsed

    def _check(self, model: PreTrainedModel, complete: bool = False) -> None:
        """Measure, log, save a resumable state, and export a full-depth model."""
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            accuracy = quiz_accuracy(model, self.tokenizer, self.quiz, None if complete else 8)
            windows = self.held_out if complete else self.held_out[::5]
            entry: dict[str, object] = {
                "seconds": round(self.elapsed),
                "layers": model.config.num_hidden_layers,
                "steps": self.step,
                "tokens": self.tokens,
                "held_out_perplexity": round(perplexity(model, windows), 3),
                "quiz_accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
            }
        model.train()
        if complete:
            entry["quiz_by_subject"] = {name: round(value, 4) for name, value in accuracy.items()}
        self.log.append(entry)
        print(json.dumps(entry), flush=True)
        saved = {"model": model.state_dict(), "layers": model.config.num_hidden_layers, "log": self.log}
        saved |= {"elapsed": self.elapsed, "step": self.step, "tokens": self.tokens}
        torch.save(saved, self.options.work / "state.new")
        (self.options.work / "state.new").replace(self.options.work / "state.pt")
        (self.options.work / "training_log.json").write_text(json.dumps(self.log, indent=1) + "\n")
        if self.options.output and model.config.num_hidden_layers == self.phases[-1].layers:
            export(model, self.tokenizer, self.options.output)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a training run's options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-folder", type=Path, action="append", default=[], help="folder of English .txt files")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock time to train for")
    parser.add_argument("--quiz", type=Path, default=Path("calib_data/quiz"), help="folder of the quiz")
    parser.add_argument("--work", type=Path, default=Path("runs/reference_model"), help="folder for resumable states")
    parser.add_argument("--output", type=Path, help="checkpoint folder to write, e.g. reference_model/checkpoint")
    parser.add_argument("--check-seconds", type=float, default=240.0, help="time between checks")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the work folder")
    return parser


def main() -> None:
    """Read the options and train."""
    Trainer(arguments(__doc__).parse_args()).run()


if __name__ == "__main__":
    main()
