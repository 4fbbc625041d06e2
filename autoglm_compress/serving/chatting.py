"""`chat`: a conversation on the terminal with a model, or with two that are told the same."""

import asyncio
import base64
import mimetypes
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2

from autoglm_compress.serving.engines import Engine
from autoglm_compress.serving.events import TEXTS, events, refusal_of
from autoglm_compress.serving.problems import RefusedError
from autoglm_compress.serving.supervisor import Supervisor
from autoglm_compress.serving.target import Target

IMAGE = "/image "
HELP = "Say something; /image FILE shows a picture with what you say next; Ctrl-D ends."


class Talker:
    """One side of a conversation: a model, and what was said. Answers are the likeliest ones, so that two compare.

    Without a chat template, each line is continued by itself.
    """

    def __init__(self, target: Target, supervisor: Supervisor) -> None:
        self.name = target.name
        self._chats = target.chat_template is not None
        self._supervisor = supervisor
        self._said: list[dict[str, Any]] = []

    async def answer(self, text: str, image: str | None) -> AsyncIterator[str]:
        """The pieces of the answer to a text, and to an image as a data URL.

        Raises:
            RefusedError: the engine refuses it.
        """
        client = self._supervisor.client
        if client is None:
            raise RefusedError(503, "the engine is being started again")
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        said = [*self._said, {"role": "user", "content": parts if image else text}]
        endpoint, asked = ("chat/completions", {"messages": said}) if self._chats else ("completions", {"prompt": text})
        body = {"model": self._supervisor.engine.model, "stream": True, "temperature": 0, **asked}
        whole = ""
        async with client.stream("POST", f"/v1/{endpoint}", json=body) as answer:
            if answer.status_code != 200:
                raise await refusal_of(answer)
            async for event in events(answer):
                for piece in _pieces(event):
                    whole += piece
                    yield piece
        self._said = [*said, {"role": "assistant", "content": whole}]


def _pieces(event: dict[str, Any]) -> list[str]:
    """The texts of an event, thoughts included."""
    found = []
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        found += [choice.get("text"), *(delta.get(name) for name in TEXTS if name != "tool_calls")]
    return [text for text in found if text]


async def converse(
    models: Sequence[tuple[Target, Engine]],
    hear: Callable[[], str | None],
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Talk until `hear` gives None.

    Args:
        models: who answers each line, one after the other.
        hear: the next line of the user.
        say: prints a piece of an answer, with no line break after it.
        note: prints a line about the conversation.

    Raises:
        UserError: an engine does not start.
    """
    async with AsyncExitStack() as stack:
        talkers = []
        for target, engine in models:
            note(f"loading {target.path} with {engine.name}")
            talkers.append(Talker(target, await stack.enter_async_context(Supervisor(engine, note))))
        note(HELP)
        image = None
        while (line := await asyncio.to_thread(hear)) is not None:
            if line.startswith(IMAGE):
                image = _read_image(Path(line.removeprefix(IMAGE).strip()), note) or image
            elif line.strip():
                for talker in talkers:
                    if len(talkers) > 1:
                        note(f"--- {talker.name}")
                    await _answer(talker, line, image, say, note)
                image = None


async def _answer(
    talker: Talker, line: str, image: str | None, say: Callable[[str], None], note: Callable[[str], None]
) -> None:
    try:
        async for piece in talker.answer(line, image):
            say(piece)
        note("")
    except (RefusedError, httpx2.HTTPError) as error:
        note(f"error: {talker.name}: {error}")


def _read_image(file: Path, note: Callable[[str], None]) -> str | None:
    """An image as a data URL; None, with a note, if it cannot be read."""
    kind = mimetypes.guess_type(file.name)[0] or ""
    if not kind.startswith("image/"):
        note(f"error: {file}: not the name of an image")
        return None
    try:
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    except OSError as error:
        note(f"error: {file}: {error.strerror}")
        return None
