"""A client of a server of OpenAI's API, which asks by chat or, if the model has no template, by completion."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai

from autoglm_compress.errors import UserError, in_one_line

SECONDS = 300
NO_KEY = "none"
"""What the client of OpenAI sends to a server that asks for no key: it needs something."""


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text, what the model thought, and its tokens."""

    text: str
    reasoning: str
    tokens: int


@dataclass(frozen=True)
class Heard:
    """A stream: its text, its pieces, seconds to the first one, and tokens per second after that."""

    text: str
    pieces: int
    first_token: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Client:
    """A model of a server. `context` is how many tokens it reads, if the server tells; `chats` whether it has a chat
    template.
    """

    api: openai.OpenAI
    base_url: str
    model: str
    context: int | None
    chats: bool

    @classmethod
    def connected(cls, base_url: str, model: str | None, key: str | None) -> "Client":
        """A client of a server that is there.

        Args:
            base_url: of the API, such as `http://127.0.0.1:8000/v1`.
            model: what it is called there; the first that the server lists by default.
            key: for the server.

        Raises:
            UserError: the server cannot be reached, refuses the key, or has no such model.
        """
        base_url = base_url.rstrip("/")
        api = openai.OpenAI(base_url=base_url, api_key=key or NO_KEY, timeout=SECONDS, max_retries=0)
        try:
            listed = {found.id: found for found in api.models.list()}
        except openai.AuthenticationError as error:
            raise UserError(f"{base_url}: refuses the key: {error.message} Give --api-key-file.") from None
        except openai.OpenAIError as error:
            raise UserError(
                f"{base_url}: cannot be asked for its models: {in_one_line(error)}. Start a server with "
                "autoglm-compress serve, or give the --base-url that it prints, with /v1 behind it."
            ) from None
        name = model or next(iter(listed), "")
        if name not in listed:
            raise UserError(f"--model {name}: {base_url} serves {', '.join(listed) or 'nothing'}.")
        context = getattr(listed[name], "max_model_len", None)
        return cls(api, base_url, name, context, _chats(api, name))

    @property
    def endpoint(self) -> str:
        """Where it asks."""
        return "/v1/chat/completions" if self.chats else "/v1/completions"

    def ask(self, prompt: str, tokens: int, **more: Any) -> Answer:
        """The likeliest answer to a text, of so many tokens at most.

        Raises:
            openai.OpenAIError: the server refuses it, or is gone.
        """
        found: Any = self._create(prompt, tokens, stream=False, extra_body=more)
        count = found.usage.completion_tokens if found.usage else 0
        choice = found.choices[0]
        if not self.chats:
            return Answer(choice.text, "", count)
        return Answer(choice.message.content or "", getattr(choice.message, "reasoning_content", None) or "", count)

    def listen(self, prompt: str, tokens: int) -> Heard:
        """The likeliest answer to a text, as a stream.

        Raises:
            openai.OpenAIError: the server refuses it, or is gone.
        """
        began, first, last, text, pieces, count = time.monotonic(), None, 0.0, "", 0, 0
        for event in self._create(prompt, tokens, stream=True, stream_options={"include_usage": True}):
            count = event.usage.completion_tokens if event.usage else count
            for piece in _pieces(event):
                last = time.monotonic() - began
                first = last if first is None else first
                text, pieces = text + piece, pieces + 1
        decoding = last - (first or 0.0)
        rate = ((count or pieces) - 1) / decoding if decoding > 0 else 0.0
        return Heard(text, pieces, first, rate)

    def _create(self, prompt: str, tokens: int, **more: Any) -> Any:
        common: dict[str, Any] = {"model": self.model, "max_tokens": tokens, "temperature": 0} | more
        if self.chats:
            return self.api.chat.completions.create(messages=[{"role": "user", "content": prompt}], **common)
        return self.api.completions.create(prompt=prompt, **common)


def _pieces(event: Any) -> Iterator[str]:
    """The texts of an event of a stream, thoughts included."""
    for choice in event.choices:
        if hasattr(choice, "delta"):
            texts = (choice.delta.content, getattr(choice.delta, "reasoning_content", None))
        else:
            texts = (choice.text, None)
        yield from (text for text in texts if text)


def _chats(api: openai.OpenAI, model: str) -> bool:
    """Whether the model has a chat template: a server refuses a chat without one."""
    try:
        api.chat.completions.create(model=model, messages=[{"role": "user", "content": "1"}], max_tokens=1)
    except openai.APIStatusError as error:
        return "chat template" not in error.message
    return True
