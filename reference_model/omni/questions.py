"""Questions about a pictured digit, a spoken digit, both, or text alone, as messages of a chat, and their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reference_model.omni.speech import WORDS

IMAGE, SOUND = "image", "audio"
"""Parts of what a user says that are files."""
SHOWN = ("Which digit is shown?", "What number do you see?", "Read the digit.")
SPOKEN = ("Which digit is spoken?", "What number do you hear?", "Write what is said.")
BOTH = ("What is the sum of both?", "Add the two digits.", "What do they make together?")
MORE = ("Add {} to it.", "What is that plus {}?")
SUMS = ("What is {} plus {}?", "Add {} and {}.", "{} + {} =")
KINDS = ("image", "audio", "both", "image_more", "audio_more", "text")
"""What is asked about: a picture, a sound, the sum of the two, of a picture or a sound and a number, text alone."""


@dataclass(frozen=True)
class Question:
    """The parts of what a user says, `IMAGE`, `SOUND` or a text, and the answer.

    `shown` and `spoken` are the digits of its picture and of its sound, if it has them.
    """

    parts: tuple[str, ...]
    answer: str
    shown: int | None = None
    spoken: int | None = None

    def messages(self, image: str | None = None, sound: str | None = None) -> list[dict[str, Any]]:
        """The chat, with the files of its picture and of its sound."""
        files = {IMAGE: image, SOUND: sound}
        content = [
            {"type": part, "path": files[part]} if part in files else {"type": "text", "text": part}
            for part in self.parts
        ]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]


def ask(kind: str, shown: int, spoken: int, generator: np.random.Generator) -> Question:
    """A question of a kind about a pictured and a spoken digit, in one of its wordings."""
    number = int(generator.integers(10))
    if kind == "image":
        return Question((IMAGE, _any(SHOWN, generator)), str(shown), shown=shown)
    if kind == "audio":
        return Question((SOUND, _any(SPOKEN, generator)), str(spoken), spoken=spoken)
    if kind == "image_more":
        words = _any(MORE, generator).format(number)
        return Question((IMAGE, words), str(shown + number), shown=shown)
    if kind == "audio_more":
        words = _any(MORE, generator).format(number)
        return Question((SOUND, words), str(spoken + number), spoken=spoken)
    if kind == "both":
        first, second = (IMAGE, SOUND) if generator.random() < 0.5 else (SOUND, IMAGE)
        parts = (first, second, _any(BOTH, generator))
        return Question(parts, str(shown + spoken), shown=shown, spoken=spoken)
    if kind == "text":
        return _of_text(number, generator)
    raise ValueError(f"{kind}: expected one of {', '.join(KINDS)}")


def _of_text(number: int, generator: np.random.Generator) -> Question:
    other, kind = int(generator.integers(10)), generator.random()
    if kind < 0.8:
        return Question((_any(SUMS, generator).format(number, other),), str(number + other))
    if kind < 0.9:
        return Question((f"Write {number} as a word.",), WORDS[number])
    return Question((f"Write {WORDS[number]} as a digit.",), str(number))


def all_words() -> list[str]:
    """Every sentence that is said in the questions and answers, for the tokenizer."""
    numbers = [str(number) for number in range(19)]
    sums = [words.format(a, b) for words in SUMS for a in range(10) for b in range(10)]
    more = [words.format(number) for words in MORE for number in range(10)]
    written = [f"Write {number} as a word." for number in range(10)] + [f"Write {word} as a digit." for word in WORDS]
    return [*SHOWN, *SPOKEN, *BOTH, *more, *sums, *written, *WORDS, *numbers]


def _any(wordings: tuple[str, ...], generator: np.random.Generator) -> str:
    return wordings[generator.integers(len(wordings))]
