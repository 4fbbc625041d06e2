"""Chats with images and sounds as token ids, for models with towers that make features of them.

Each token that stands for a feature gets an id of its own, past the vocabulary, in the order in which chats are read.
Rows of ids can then be cut, shuffled and shared out as those of text, and still say which features they hold.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autoglm_compress.architecture import Family
from autoglm_compress.calibration.chat import DATE, Chat, file_of
from autoglm_compress.checkpoint.model_config import load_config, text_config
from autoglm_compress.checkpoint.processor import load_processor
from autoglm_compress.errors import UserError, in_one_line
from autoglm_compress.hashing import key_of

PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
"""The fields of a model's config that name the token which stands for a feature, by the type of a part."""


class MediaChats:
    """The chats with images and sounds that were read so far.

    Args:
        folder: the model's, whose processor reads them.
        family: the model's.
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self._folder, self._family = folder, family
        self._config = load_config(folder)
        self._chats: list[Chat] = []
        self._ids: dict[str, list[int]] = {}
        self._firsts: list[int] = []
        self.vocab_size: int = text_config(self._config, family, str(folder / "config.json")).vocab_size
        """The first id of a feature."""
        self._next = self.vocab_size

    @property
    def end(self) -> int:
        """The id after the last one of all features that were read."""
        return self._next

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self._folder)

    @cached_property
    def _date(self) -> dict[str, str]:
        """The date for a template that prints one. Others are given none: the processor would warn of it."""
        return {"date_string": DATE} if "date_string" in str(self._processor.chat_template) else {}

    @cached_property
    def _placeholders(self) -> dict[str, int]:
        """The token that stands for a feature of an image, of a sound, by the type of a part."""
        found: dict[str, int] = {}
        for kind, fields in PLACEHOLDERS.items():
            tokens = (getattr(self._config, field, None) for field in fields)
            token = next((token for token in tokens if token is not None), None)
            if token is not None:
                found[kind] = token
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The types of parts that the model has a tower for."""
        return tuple(self._placeholders)

    def ids(self, chat: Chat) -> list[int]:
        """The tokens of a chat. Those that stand for features are past the vocabulary, and the same at every call.

        Raises:
            UserError: the model has no tower for a part, or the processor refuses the chat.
        """
        key = key_of([chat.messages, chat.tools, str(chat.folder), chat.asks])
        if key not in self._ids:
            self._ids[key] = self._read(chat)
        return self._ids[key]

    def _read(self, chat: Chat) -> list[int]:
        for kind in chat.media:
            if kind not in self._placeholders:
                raise UserError(f"{chat.where}: {kind}: {self._family.architecture} has no tower for it.")
        tokens = self.inputs_of(chat)["input_ids"][0]
        stands = torch.isin(tokens, torch.tensor(list(self._placeholders.values())))
        count = int(stands.sum())
        if not count:
            raise UserError(
                f"{chat.where}: the chat template shows none of its images and sounds. Check the template's file, or "
                "leave the row out."
            )
        ids = tokens.clone()
        ids[stands] = torch.arange(self._next, self._next + count)
        self._chats.append(chat)
        self._firsts.append(self._next)
        self._next += count
        return ids.tolist()

    @property
    def count(self) -> int:
        """How many chats were read."""
        return len(self._chats)

    @property
    def key(self) -> str:
        """A hash of the chats that were read and of their files, which the ids do not tell."""
        return key_of([chat.content for chat in self._chats])

    def owners(self, ids: torch.Tensor) -> torch.Tensor:
        """For each of some ids the number of the chat whose feature it stands for, -1 for other tokens."""
        return torch.searchsorted(torch.tensor(self._firsts, dtype=torch.long), ids.long().contiguous(), right=True) - 1

    def features_of(self, number: int) -> range:
        """The ids of a chat's features, by its number."""
        end = self._firsts[number + 1] if number + 1 < len(self._firsts) else self._next
        return range(self._firsts[number], end)

    def chat(self, number: int) -> Chat:
        """A chat by its number."""
        return self._chats[number]

    def inputs_of(self, chat: Chat) -> dict[str, torch.Tensor]:
        """What the model takes for a chat: token ids [1, length], pixels, spectrograms and so on.

        Raises:
            UserError: the processor, or its template, refuses the chat, or a file cannot be read.
        """
        messages = [_with_whole_paths(turn, chat.folder) for turn in chat.messages]
        try:
            found = self._processor.apply_chat_template(
                messages,
                tools=chat.tools,
                add_generation_prompt=chat.asks,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **self._date,
            )
        except ImportError as error:
            raise UserError(
                f"{chat.where}: {in_one_line(error)[:300]}. Install what reads images and sounds: "
                "pip install 'autoglm-compress[media]'."
            ) from None
        except Exception as error:  # processors raise many kinds; the user needs one sentence
            named = ", ".join(file.name for file in chat.files)
            raise UserError(
                f"{chat.where}: the model's processor cannot read this row ({named}): {in_one_line(error)[:300]}. Mend "
                "the file, or leave the row out."
            ) from None
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _with_whole_paths(turn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message whose content is a list of parts, with files that can be opened from anywhere."""
    content = turn.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    whole = [
        part if part["type"] == "text" else {"type": part["type"], "path": str(folder / file_of(part))}
        for part in parts
    ]
    return {name: value for name, value in turn.items() if value is not None} | {"content": whole}
