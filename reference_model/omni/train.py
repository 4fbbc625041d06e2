"""Train the model that sees and hears, in minutes on two CPU cores.

    pip install espeakng-loader
    python -m reference_model.omni.train --steps 2800 --output reference_model/omni/checkpoint

The model starts with 4 text layers; at the end of the first part the last three are split into nine that each do a
third of the work, and all are trained on. A run that was killed continues from its last saved state, with fresh moments
of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen2_5OmniThinkerForConditionalGeneration

from reference_model.omni.batches import Batch, Batches, Encoder
from reference_model.omni.building import (
    FRAMES,
    IMAGE_TOKENS,
    LAYERS,
    PATCHES,
    SOUND_TOKENS,
    deepened,
    make_model,
    make_tokenizer,
    save,
)
from reference_model.omni.digits import pictures
from reference_model.omni.speech import Speaker, clips

SHALLOW = 4
DEEPEN_AT = 0.92
"""Share of the steps."""
ROWS, PACKED_ROWS = 48, 24
"""Rows of one chat each, and of several, which from the deepening on come in turns."""
RATE = 2.5e-3
WARM_UP = 0.03
LAST_RATE = 0.02
ROUNDS = 8
"""Clips of every voice and digit."""
FIRST = {"image": 0.3, "audio": 0.35, "text": 0.2, "image_more": 0.05, "audio_more": 0.05, "both": 0.05}
LATER = {"image": 0.13, "audio": 0.14, "text": 0.08, "image_more": 0.12, "audio_more": 0.13, "both": 0.4}
CHANGE = (0.15, 0.4)
"""Between these shares of the steps the first mixture of questions turns into the later one."""
NAMING, NAMED_UNTIL, NAMING_HEAT = 0.5, 0.5, 0.1
"""What the naming loss counts at first, when it counts nothing any more, and by what likeness is divided."""
CHECK_STEPS = 50
CHECKED = dict.fromkeys(("image", "audio", "both", "text"), 200)
SEED = 26


def _attention_of(length: int) -> object:
    """Attention among each `length` positions of a tower in turn, all in one product."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        heads, _positions, size = query.shape[1:]
        parts = [each.view(heads, -1, length, size).transpose(0, 1) for each in (query, key, value)]
        found = F.scaled_dot_product_attention(*parts, scale=scaling)
        return found.transpose(1, 2).reshape(1, -1, heads, size), None

    return attend


AttentionInterface.register("images", _attention_of(PATCHES))
AttentionInterface.register("sounds", _attention_of(FRAMES // 2))


def features_of(model: Qwen2_5OmniThinkerForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the towers make of all images [images, 4, width] and all sounds [sounds, 16, width], of either some."""
    images, sounds = len(batch.shown), len(batch.spoken)
    width = model.config.text_config.hidden_size
    seen, heard = torch.zeros(0, IMAGE_TOKENS, width), torch.zeros(0, SOUND_TOKENS, width)
    if images:
        whole = torch.tensor([0, images * PATCHES])
        made = model.model.visual(
            batch.pixels,
            grid_thw=torch.tensor([[1, 4, 4]] * images),
            cu_seqlens=whole,
            cu_window_seqlens=whole,
            window_index=torch.arange(images * IMAGE_TOKENS),
        )
        seen = made.pooler_output.view(images, IMAGE_TOKENS, width)
    if sounds:
        made = model.model.audio_tower(
            batch.mels.transpose(0, 1).flatten(1),
            feature_lens=torch.full((sounds,), FRAMES),
            cu_seqlens=torch.tensor([0, sounds * FRAMES // 2]),
        )
        heard = made.last_hidden_state.view(sounds, SOUND_TOKENS, width)
    return seen, heard


def logits_of(
    model: Qwen2_5OmniThinkerForConditionalGeneration, batch: Batch, seen: torch.Tensor, heard: torch.Tensor
) -> torch.Tensor:
    """The model's logits [rows, tokens, vocabulary] with the features of the towers in their places."""
    states = model.model.language_model.embed_tokens(batch.ids)
    for token, features in ((model.config.image_token_id, seen), (model.config.audio_token_id, heard)):
        states = states.masked_scatter((batch.ids == token)[..., None], features)
    states = model.model.language_model(inputs_embeds=states, position_ids=batch.positions, use_cache=False)
    return model.lm_head(states.last_hidden_state)


def loss_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The weighted mean cross entropy."""
    weights = batch.weights[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def naming_loss(features: torch.Tensor, digits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """How far the mean feature of a picture or a sound is from the embedding of its digit.

    With it the towers learn within a hundred steps, without it only after the text layers have learned to look.
    """
    likeness = F.normalize(features.mean(dim=1), dim=-1) @ F.normalize(words, dim=-1).T
    return F.cross_entropy(likeness / NAMING_HEAT, digits)


@torch.no_grad()
def accuracy(model: Qwen2_5OmniThinkerForConditionalGeneration, batch: Batch) -> float:
    """The share of rows of one chat whose answer has the highest logit."""
    answer = (batch.weights == 1).float().argmax(dim=1)
    rows = torch.arange(len(answer))
    guess = logits_of(model, batch, *features_of(model, batch))[rows, answer - 1].argmax(dim=-1)
    return (guess == batch.ids[rows, answer]).float().mean().item()


def read_clips(file: Path, heard: bool, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips [count, samples] in int16, their digits and how many samples each fills, made once and kept in a file."""
    if not file.exists():
        made = list(clips(Speaker(), heard, rounds, np.random.default_rng(SEED + heard)))
        np.savez(
            file,
            samples=np.stack([clip.samples for clip in made]),
            digits=np.array([clip.digit for clip in made]),
            lengths=np.array([clip.length for clip in made]),
        )
    found = np.load(file)
    return tuple(torch.from_numpy(found[name]) for name in ("samples", "digits", "lengths"))  # type: ignore[return-value]


def shares_at(done: float) -> dict[str, float]:
    """How many questions are of each kind after a share of the steps."""
    turned = min(max((done - CHANGE[0]) / (CHANGE[1] - CHANGE[0]), 0.0), 1.0)
    return {kind: (1 - turned) * FIRST[kind] + turned * LATER[kind] for kind in FIRST}


def rate_at(done: float) -> float:
    """The learning rate after a share of the steps, as a share of the highest: a cosine after a short rise."""
    fallen = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, done / WARM_UP + 0.02) * fallen


class Trainer:
    """A run that continues where a kill left it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = make_tokenizer()
        self.digits = torch.tensor(self.tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]))
        encoder = Encoder(self.tokenizer)
        heard = read_clips(options.work / "heard.npz", True, ROUNDS)
        tested = read_clips(options.work / "tested.npz", False, ROUNDS)
        self.seconds, self.step = 0.0, 0
        self.log: list[dict[str, object]] = []
        self._saved = options.work / "latest.pt"
        state = torch.load(self._saved) if self._saved.exists() else None
        if state is not None:
            self.seconds, self.step, self.log = state["seconds"], state["step"], state["log"]
        self.batches = Batches(encoder, *pictures(True), *heard, seed=SEED + self.step)
        held_out = Batches(encoder, *pictures(False), *tested, seed=SEED, distort=False)
        self.checks = {kind: held_out.draw(rows, {kind: 1.0}, packed=False) for kind, rows in CHECKED.items()}
        torch.manual_seed(SEED)
        self._use(make_model(self.tokenizer, state["layers"] if state else SHALLOW))
        if state is not None:
            self.model.load_state_dict(state["model"])
            self._use(self.model)

    def _use(self, model: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
        self.model = model
        model.model.visual.config._attn_implementation = "images"
        model.model.audio_tower.config._attn_implementation = "sounds"
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.98), weight_decay=0.02, foreach=True)

    @property
    def _layers(self) -> int:
        return self.model.config.text_config.num_hidden_layers

    def run(self) -> None:
        """Train to the last step, then write the checkpoint and the log beside it."""
        start = self.seconds - time.process_time()
        losses: list[float] = []
        while self.step < self.options.steps:
            done = self.step / self.options.steps
            if done >= DEEPEN_AT and self._layers < LAYERS:
                self._use(deepened(self.model, self.tokenizer))
            packed = self._layers == LAYERS and self.step % 2 == 0
            batch = self.batches.draw(PACKED_ROWS if packed else ROWS, shares_at(done), packed)
            loss = self._loss(batch, done)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * rate_at(done)
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
            self.seconds = start + time.process_time()
            if self.step % CHECK_STEPS == 0:
                self._check(losses)
                self._keep()
        save(self.model, self.tokenizer, self.options.output)
        (self.options.output.parent / "training_log.json").write_text(json.dumps(self.log, indent=1) + "\n")

    def _loss(self, batch: Batch, done: float) -> torch.Tensor:
        seen, heard = features_of(self.model, batch)
        loss = loss_of(logits_of(self.model, batch, seen, heard), batch)
        share = NAMING * max(0.0, 1 - done / NAMED_UNTIL)
        if share:
            words = self.model.model.language_model.embed_tokens(self.digits)
            loss = loss + share * (naming_loss(seen, batch.shown, words) + naming_loss(heard, batch.spoken, words))
        return loss

    def _check(self, losses: list[float]) -> None:
        found = {kind: round(accuracy(self.model, batch), 4) for kind, batch in self.checks.items()}
        mean = round(sum(losses) / len(losses), 4)
        losses.clear()
        self.log.append({"cpu_seconds": round(self.seconds), "step": self.step, "layers": self._layers, "loss": mean})
        self.log[-1] |= {"held_out": found}
        print(time.strftime("%H:%M:%S"), json.dumps(self.log[-1]), flush=True)

    def _keep(self) -> None:
        state = {"model": self.model.state_dict(), "layers": self._layers, "log": self.log}
        state |= {"seconds": self.seconds, "step": self.step}
        fresh = self._saved.with_suffix(".new")
        torch.save(state, fresh)
        fresh.rename(self._saved)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--work", type=Path, default=Path("omni-training"), help="folder for clips and saved states")
    parser.add_argument("--output", type=Path, default=Path("reference_model/omni/checkpoint"))
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
