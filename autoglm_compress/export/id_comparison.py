"""Whether an engine reads text as a tokenizer of `transformers` does: texts in many scripts, and special tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoglm_compress.export.sample_texts import sample_texts

MOST_SPECIAL = 50
"""Of the special tokens, so many are read between words."""


@dataclass(frozen=True)
class IdComparison:
    """Texts, and the ids that `transformers` and the engine have for each."""

    texts: list[str]
    expected: list[list[int]]
    found: list[list[int]]

    def differing(self) -> list[int]:
        """The numbers of the texts that have other ids."""
        pairs = zip(self.expected, self.found, strict=True)
        return [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs]

    def example(self, number: int) -> str:
        """A text with its ids in the engine and in `transformers`, shortened for a message."""
        return f"{self.texts[number][:40]!r}: {self.found[number][:12]} instead of {self.expected[number][:12]}"


def compare_with(tokenizer: Any, read: Callable[[list[str]], list[list[int]]]) -> IdComparison:
    """Compare a tokenizer of `transformers` with `read`, which gives the engine's ids of texts."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:MOST_SPECIAL]
    texts = sample_texts() + [f"before{token}after" for token in special]
    found = read(texts)
    expected = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return IdComparison(texts, expected, found)
