"""Chat rows: their allowed content, and their text by the tokenizer's chat template."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from autoglm_compress.errors import UserError
from autoglm_compress.hashing import sha256

EXPECTED = 'expected {"text": …} or {"messages": [{"role": …, "content": …}, …]}'
DATE = "1 Jan 2025"
"""Some templates print the date: it must not change the tokens from one day to the next."""
PROBE = "autoglm-probe"
MEDIA = ("image", "audio")
"""The types of parts that are files."""
REMOTE = ("http:", "https:", "data:", "ftp:")


@dataclass(frozen=True)
class Chat:
    """The messages of a chat and the tools offered in it, as chat templates take them; `where` is `file:line`.

    Files of images and sounds are relative to `folder`. A chat that `asks` ends where the model's own turn begins.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str
    folder: Path = Path()
    asks: bool = False

    @property
    def media(self) -> tuple[str, ...]:
        """The types of its parts that are files, each once."""
        return tuple(dict.fromkeys(part["type"] for part in self._media_parts()))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of images and sounds, in order."""
        return tuple(self.folder / file_of(part) for part in self._media_parts())

    @property
    def content(self) -> list[Any]:
        """All that a model is shown, as JSON takes it: messages, tools, whether it is asked, hashes of the files."""
        return [self.messages, self.tools, self.asks, [sha256(file) for file in self.files]]

    def _media_parts(self) -> Iterator[dict[str, Any]]:
        contents = (turn.get("content") for turn in self.messages)
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return (part for part in parts if part["type"] in MEDIA)


def read_chat(row: dict[str, Any], where: str, folder: Path) -> Chat:
    """The chat of a row with `messages` and, perhaps, `tools`.

    The content of a message is text, a list of parts, or, beside tool calls, null. A part is text, or an image or a
    sound, as a file within `folder`.

    Raises:
        UserError: a field is not what chat templates take, or a file is not there.
    """
    messages, tools = row.get("messages"), row.get("tools") or None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {EXPECTED}.")
    for number, turn in enumerate(messages):
        if problem := _problem(turn):
            raise UserError(f"{where}: {EXPECTED}: messages[{number}]{problem}.")
    if tools is not None and not _are_objects(tools):
        raise UserError(f"{where}: tools: expected a list of JSON schemas, found {_shown(tools)}.")
    chat = Chat(messages, tools, where, folder)
    for file in chat.files:
        require_file(file, folder, where)
    return chat


def file_of(part: dict[str, Any]) -> str:
    """The file that an image part or an audio part names."""
    return part["path"] if "path" in part else part["url"]


def require_file(file: Path, folder: Path, where: str) -> None:
    """Raise UserError if a file that a row names is not there, or not within the folder of the rows."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {file}: not within {folder}, the folder of the rows. Put the file there.")
    if not file.is_file():
        raise UserError(f"{where}: no file {file}. Put it there, or leave the row out.")


def chat_text(tokenizer: Any, chat: Chat) -> str:
    """The text of a chat by the tokenizer's chat template, or lines of `role: content` if there is no template.

    A template that knows text parts gets the parts. Other templates get them joined to one text.

    Raises:
        UserError: the template refuses the chat, or is broken.
    """
    # transformers leaves null fields out too, but not in every version.
    messages = [{name: value for name, value in turn.items() if value is not None} for turn in chat.messages]
    has_parts = any(isinstance(turn.get("content"), list) for turn in messages)
    if not tokenizer.chat_template:
        opening = ["assistant:"] if chat.asks else []
        return "\n".join([*map(_line, map(_with_joined_parts, messages)), *opening])
    if has_parts and not _knows_parts(tokenizer):
        messages = list(map(_with_joined_parts, messages))
    try:
        return _render(tokenizer, messages, chat.tools, asks=chat.asks)
    except Exception as error:  # a template can raise anything
        raise _refusal(tokenizer, chat, error) from None


def _problem(turn: Any) -> str | None:
    """The error in a message, as its path and a sentence."""
    if not isinstance(turn, dict):
        return f": found {_shown(turn)}"
    if not isinstance(turn.get("role"), str):
        return f".role: found {_shown(turn.get('role'))}"
    content, calls = turn.get("content"), turn.get("tool_calls")
    if calls is not None and not _are_objects(calls):
        return f".tool_calls: expected a list of objects, found {_shown(calls)}"
    if isinstance(content, list):
        problems = ((number, _part_problem(part)) for number, part in enumerate(content))
        return next((f".content[{number}]{problem}" for number, problem in problems if problem), None)
    if isinstance(content, str) or (content is None and calls):
        return None
    return f".content: expected text, or null beside tool_calls: found {_shown(content)}"


def _part_problem(part: Any) -> str | None:
    if not isinstance(part, dict):
        return f': expected {{"type": "text", "text": …}}, found {_shown(part)}'
    if part.get("type") in MEDIA:
        return _file_problem(part)
    if part.get("type") != "text":
        return (
            f": a part of type {part.get('type')!r}: text, images and audio are all that is read. "
            "Leave such rows, or such parts, out"
        )
    return None if isinstance(part.get("text"), str) else f".text: expected text, found {_shown(part.get('text'))}"


def _file_problem(part: dict[str, Any]) -> str | None:
    field = "path" if "path" in part else "url"
    file = part.get(field)
    if not isinstance(file, str) or not file:
        return f': expected {{"type": "{part["type"]}", "path": …}}, a file beside the rows, found {_shown(part)}'
    if file.startswith(REMOTE):
        return f".{field}: {_shown(file)}: nothing is downloaded: give a file beside the rows"
    return None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _with_joined_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return turn | {"content": "".join(part["text"] for part in content)} if isinstance(content, list) else turn


def _line(turn: dict[str, Any]) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join([f"{turn['role']}: {turn.get('content', '')}", *calls])


def _knows_parts(tokenizer: Any) -> bool:
    """Whether the template shows the text of a text part. Other templates drop it, or print the list as Python does."""
    content = [{"type": "text", "text": PROBE}]
    try:
        text = _render(tokenizer, [{"role": "user", "content": content}], None)
    except Exception:  # a template can raise anything
        return False
    return PROBE in text.replace(f"'{PROBE}'", "").replace(f'"{PROBE}"', "")


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, asks: bool = False
) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=asks, date_string=DATE
    )


def _refusal(tokenizer: Any, chat: Chat, error: Exception) -> UserError:
    words = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    file = _template_file(tokenizer, chat)
    if isinstance(error, TemplateSyntaxError):
        return UserError(
            f"{chat.where}: the chat template in {file} is not valid, line {error.lineno}: {words}. Correct it there."
        )
    return UserError(
        f"{chat.where}: the chat template in {file} cannot write this row: {words}. Change the row, or leave it out."
    )


def _template_file(tokenizer: Any, chat: Chat) -> Path:
    """The file with the template, found as transformers finds it."""
    folder = Path(tokenizer.name_or_path)
    names = ["additional_chat_templates/tool_use.jinja"] if chat.tools else []
    names += ["chat_template.jinja", "chat_template.json"]
    return next((folder / name for name in names if (folder / name).is_file()), folder / "tokenizer_config.json")
