"""Batches for training: chats as tokens and positions, one or several in a row, with what the towers read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from reference_model.omni.building import (
    IMAGE_TOKENS,
    SOUND_TOKENS,
    SPECIAL,
    TURN_END,
    make_feature_extractor,
)
from reference_model.omni.digits import distorted
from reference_model.omni.questions import Question, ask
from reference_model.omni.speech import RATE, SAMPLES

ROW = 80
"""Tokens of a row that several chats share."""
SINGLE = 37
"""Tokens of a row of one chat."""
ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.03
SPEED = 0.08
"""Standard deviation of the logarithm of how much faster or slower a clip is played, higher or lower with it."""


@dataclass
class Batch:
    """Rows of chats, and the pictures and sounds in them in the order of their placeholders."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    """What the prediction of each token counts in the loss; shaped as `ids`."""
    pixels: torch.Tensor
    """Patches of all images, as the image processor makes them."""
    shown: torch.Tensor
    """The digit of each image."""
    mels: torch.Tensor
    """[sounds, bins, frames]."""
    spoken: torch.Tensor
    """The digit of each sound."""


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def patches(images: torch.Tensor) -> torch.Tensor:
    """Images [count, 8, 8] in uint8 as the image processor makes them: [16 x count, 3 x 2 x 2] in float32."""
    pixels = (images.float() / 255 - 0.5) / 0.5
    pixels = pixels[:, None].expand(-1, 3, -1, -1).reshape(-1, 3, 2, 2, 2, 2, 2, 2)
    return pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 12)


class Encoder:
    """Writes chats as tokens and positions as the processor and the model do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._image = tokenizer.convert_tokens_to_ids(SPECIAL["image_token"])
        self._sound = tokenizer.convert_tokens_to_ids(SPECIAL["audio_token"])
        self._turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
        self._known: dict[Question, list[int]] = {}
        self.end = tokenizer.eos_token_id

    def ids(self, question: Question) -> list[int]:
        """The tokens of a chat, with as many placeholders as features."""
        key = Question(question.parts, question.answer)
        if key not in self._known:
            text = self._tokenizer.apply_chat_template(question.messages("", ""), tokenize=False)
            text = text.replace(SPECIAL["image_token"], SPECIAL["image_token"] * IMAGE_TOKENS)
            text = text.replace(SPECIAL["audio_token"], SPECIAL["audio_token"] * SOUND_TOKENS)
            self._known[key] = self._tokenizer(text)["input_ids"]
        return self._known[key]

    def append(self, row: _Row, question: Question) -> None:
        """Add a chat to a row. Positions of an image's four tokens are a square; the text goes on after its side."""
        ids = self.ids(question)
        at, seen = (max(row.positions[-1]) + 1 if row.positions else 0), 0
        for token in ids:
            if token == self._image:
                row.positions.append((at, at + seen // 2, at + seen % 2))
                seen += 1
                if seen == IMAGE_TOKENS:
                    at, seen = at + 2, 0
            else:
                row.positions.append((at, at, at))
                at += 1
        answer = len(ids) - 1 - ids[:-1][::-1].index(self._turn_end) - 1
        row.ids += ids
        row.weights += [
            ANSWER_WEIGHT if number > answer + 1 else 0.0 if token in (self._image, self._sound) else TEXT_WEIGHT
            for number, token in enumerate(ids)
        ]

    def finish(self, row: _Row, length: int) -> None:
        """Fill a row with the token that ends texts, or cut it."""
        while len(row.ids) < length:
            at = max(row.positions[-1]) + 1
            row.ids.append(self.end)
            row.positions.append((at, at, at))
            row.weights.append(0.0)
        del row.ids[length:], row.positions[length:], row.weights[length:]


class Batches:
    """Draws batches without an end.

    Args:
        images: [count, 8, 8] in uint8; `shown` are their digits.
        sounds: clips [count, samples] in int16; `spoken` their digits, `lengths` the samples that each fills.
        distort: whether images and sounds are changed at random.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: torch.Tensor,
        shown: torch.Tensor,
        sounds: torch.Tensor,
        spoken: torch.Tensor,
        lengths: torch.Tensor,
        seed: int,
        distort: bool = True,
    ) -> None:
        self._encoder, self._distort = encoder, distort
        self._images, self._shown = images, shown
        self._sounds, self._spoken, self._lengths = sounds, spoken, lengths
        self._numbers = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._extractor = make_feature_extractor()

    def draw(self, rows: int, shares: dict[str, float], packed: bool) -> Batch:
        """Rows of chats of kinds in these shares: of one chat each, or as many as fit."""
        made: list[_Row] = []
        images: list[int] = []
        sounds: list[int] = []
        length = ROW if packed else SINGLE
        for _ in range(rows):
            row = _Row()
            for image, sound, question in self._questions(shares):
                if row.ids and (not packed or len(row.ids) + len(self._encoder.ids(question)) > length):
                    break
                if row.ids:
                    self._encoder.finish(row, len(row.ids) + 1)  # as calibration does between documents
                images += [image] if question.shown is not None else []
                sounds += [sound] if question.spoken is not None else []
                self._encoder.append(row, question)
            self._encoder.finish(row, length)
            made.append(row)
        return Batch(
            ids=torch.tensor([row.ids for row in made]),
            positions=torch.tensor([row.positions for row in made]).permute(2, 0, 1),
            weights=torch.tensor([row.weights for row in made]),
            pixels=self._pixels(images),
            shown=self._shown[images],
            mels=self._mels(sounds),
            spoken=self._spoken[sounds],
        )

    def _questions(self, shares: dict[str, float]) -> Iterator[tuple[int, int, Question]]:
        kinds = list(shares)
        chances = np.cumsum([shares[kind] for kind in kinds])
        while True:
            image = int(self._numbers.integers(len(self._images)))
            sound = int(self._numbers.integers(len(self._sounds)))
            kind = kinds[int(np.searchsorted(chances, self._numbers.random() * chances[-1]))]
            yield image, sound, ask(kind, int(self._shown[image]), int(self._spoken[sound]), self._numbers)

    def _pixels(self, chosen: list[int]) -> torch.Tensor:
        images = self._images[chosen]
        return patches(distorted(images, self._generator) if self._distort else images)

    def _mels(self, chosen: list[int]) -> torch.Tensor:
        clips, lengths = self._sounds[chosen].float() / 32768, self._lengths[chosen].float()
        count = len(chosen)
        if not count:
            return torch.zeros(0, self._extractor.feature_size, 64)
        speed = torch.ones(count)
        if self._distort:
            speed = torch.exp(SPEED * torch.randn(count, generator=self._generator))
        start = torch.rand(count, generator=self._generator) * (SAMPLES - lengths / speed).clamp(min=0)
        placed = _played(clips, speed, start)
        if self._distort:
            loudness = 10 ** (-1.0 * torch.rand(count, 1, generator=self._generator))
            noise = 10 ** (-1.5 - 2.5 * torch.rand(count, 1, generator=self._generator)) * 0.5
            noise = noise * (torch.rand(count, 1, generator=self._generator) < 0.5)
            placed = loudness * (placed + noise * torch.randn(placed.shape, generator=self._generator))
        found = self._extractor(placed.numpy(), sampling_rate=RATE, return_tensors="pt")
        return found["input_features"]


def _played(clips: torch.Tensor, speed: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Clips [count, samples] that begin at a sample and are played faster or slower; silence where they are not."""
    at = (torch.arange(clips.shape[1])[None] - start[:, None]) * speed[:, None]
    below = at.floor()
    share = at - below
    inside = (at >= 0) & (at < clips.shape[1] - 1)
    index = below.long().clamp(0, clips.shape[1] - 2)
    values = clips.gather(1, index) * (1 - share) + clips.gather(1, index + 1) * share
    return values * inside
