"""Chats as what a model is asked and what it should say: the answer is the last message."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autoglm_compress.calibration.chat import Chat
from autoglm_compress.calibration.python_docs import Split
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import Document, is_in, numbered_rows
from autoglm_compress.errors import UserError


@dataclass(frozen=True)
class Exchange:
    """A chat up to where the model's turn begins, and what it should say there."""

    prompt: Chat
    answer: str

    @property
    def question(self) -> str:
        """The text of the last message before the answer."""
        return _text(self.prompt.messages[-1])


def exchanges(path: Path, split: Split | None = None) -> Iterator[Exchange]:
    """The rows of a .jsonl file, or of one split of it.

    Raises:
        UserError: a row is not a chat that ends with an answer in words.
    """
    for where, document in numbered_rows(path):
        found = _exchange(document, where)
        if split is None or is_in(document, split):
            yield found


def held_out_answers(path: Path, samples: int, seed: int) -> list[Exchange]:
    """Rows of a file's held-out split, at most so many, in an order that the seed decides.

    Raises:
        UserError: there is none, or a row of the file has no answer.
    """
    found = list(exchanges(path, "held-out"))
    if not found:
        raise UserError(f"{path}: no row is held out to measure answers on. Give more rows.")
    random.Random(seed).shuffle(found)
    return found[:samples]


def predicted(reader: Reader, exchange: Exchange, longest: int | None) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its answer.

    Args:
        reader: what reads chats for the model.
        exchange: the two.
        longest: the most tokens that the model reads; None if there is no limit.

    Raises:
        UserError: together they are longer, or the reader refuses the chat.
    """
    prompt, answer = reader.ids(exchange.prompt), reader.answer_ids(exchange.answer)
    require_length(exchange.prompt, len(prompt) + len(answer), longest)
    return prompt, answer


def require_length(chat: Chat, tokens: int, longest: int | None) -> None:
    """Raise UserError if a chat and what follows it have more tokens than the model reads."""
    if longest is not None and tokens > longest:
        raise UserError(
            f"{chat.where}: {tokens} tokens with the answer, and the model reads {longest} (max_position_embeddings). "
            "Shorten the row, give smaller files, or leave the row out."
        )


def _exchange(document: Document, where: str) -> Exchange:
    if isinstance(document, str):
        raise UserError(f'{where}: text without an answer: expected {{"messages": […]}}, the last one the answer.')
    *before, last = document.messages
    answer = _text(last)
    if not before or last["role"] != "assistant" or not answer.strip():
        raise UserError(
            f"{where}: no answer: expected messages that end with one of the role assistant, in words. Add the right "
            "answer as the last message, or leave the row out."
        )
    return Exchange(replace(document, messages=before, asks=True), answer)


def _text(turn: dict[str, object]) -> str:
    """The words of a message."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return str(content or "")
