"""Whether an engine reads text as a tokenizer of `transformers` does: texts in many scripts, and special tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoglm_compress.errors import UserError
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


def compare_with(
    tokenizer: Any, read: Callable[[list[str]], list[list[int]]], *, adds_special: bool = False
) -> IdComparison:
    """Compare a tokenizer of `transformers` with an engine.

    Args:
        tokenizer: of `transformers`.
        read: gives the engine's ids of texts.
        adds_special: whether the engine puts special tokens around a text, as the tokenizer does by itself.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:MOST_SPECIAL]
    texts = sample_texts() + [f"before{token}after" for token in special]
    found = read(texts)
    expected = [tokenizer(text, add_special_tokens=adds_special, verbose=False)["input_ids"] for text in texts]
    return IdComparison(texts, expected, found)


def require_alike(tokenizer: Any, compared: IdComparison, where: str, engine: str, format_: str) -> None:
    """Raise UserError if an engine gives other ids for more than blanks.

    Args:
        tokenizer: of `transformers`.
        compared: what both give.
        where: the model's folder, for messages.
        engine: the engine's name, for messages.
        format_: the format's name, for messages.
    """
    wrong = [number for number in compared.differing() if not _alike_but_for_blanks(tokenizer, compared, number)]
    if wrong:
        raise UserError(
            f"{where}: {engine}'s tokenizer gives other ids for {len(wrong)} of {len(compared.texts)} texts, "
            f"such as {compared.example(wrong[0])}. "
            f"The model would read nonsense: it cannot be exported to {format_} with this tokenizer."
        )


def _alike_but_for_blanks(tokenizer: Any, compared: IdComparison, number: int) -> bool:
    """Whether two readings have the same text, and the same tokens but for those of spaces and line breaks.

    Some engines do not go back where `\\s*[\\r\\n]+` has read too much, as the expressions of many tokenizers ask for.
    """
    ours, theirs = compared.expected[number], compared.found[number]
    if tokenizer.decode(ours) != tokenizer.decode(theirs):
        return False
    rest = [[token for token in ids if not tokenizer.decode([token]).isspace()] for ids in (ours, theirs)]
    return rest[0] == rest[1]


def blanks_problem(compared: IdComparison, engine: str) -> str | None:
    """What to know of blanks that an engine reads as other tokens; None if there are none."""
    if not (differing := compared.differing()):
        return None
    return (
        f"{engine} reads runs of spaces and line breaks as other tokens in {len(differing)} of "
        f"{len(compared.texts)} texts, such as {compared.texts[differing[0]][:40]!r}"
    )
