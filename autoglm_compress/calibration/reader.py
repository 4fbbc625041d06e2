"""From documents to token ids: text by a tokenizer, images and sounds by a model's processor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import Family
from autoglm_compress.calibration.chat import Chat, chat_text
from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.text import Document
from autoglm_compress.errors import UserError


@dataclass(frozen=True)
class Reader:
    """What reads documents for a model; `media` reads chats with images or sounds, where the model has towers."""

    tokenizer: Any
    media: MediaChats | None = None

    def ids(self, document: Document) -> list[int]:
        """The tokens of a document, and the end-of-text token if there is one. It does not follow a chat that asks.

        Raises:
            UserError: a chat has an image or a sound that the model does not take, or its template refuses it.
        """
        asks = isinstance(document, Chat) and document.asks
        end = [] if asks or self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if isinstance(document, Chat) and document.media:
            if self.media is None:
                kinds = " and ".join(document.media)
                raise UserError(f"{document.where}: {kinds}: the model reads text alone. Leave such rows out.")
            return self.media.ids(document) + end
        text = document if isinstance(document, str) else chat_text(self.tokenizer, document)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + end

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of what follows a chat that asks. Where there is no chat template, a space is before it."""
        text = answer if self.tokenizer.chat_template else f" {answer}"
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def end(self) -> int | None:
        """The id after the last one that stands for a feature of what was read; None if nothing has features."""
        return self.media.end if self.media is not None and self.media.count else None

    @property
    def key(self) -> str:
        """A hash of the chats with images or sounds that were read, which ids do not tell. Empty if there were none."""
        return self.media.key if self.media is not None and self.media.count else ""


def reader_of(folder: Path, family: Family, tokenizer: Any) -> Reader:
    """What reads documents for the model of a family in a folder."""
    return Reader(tokenizer, MediaChats(folder, family) if family.kept else None)
