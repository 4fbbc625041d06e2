"""The events of a stream, as an engine sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from autoglm_compress.serving.problems import RefusedError, of_engine

TEXTS = ("content", "reasoning", "reasoning_content", "tool_calls")
"""What a piece of an answer may have."""


async def refusal_of(answer: httpx2.Response) -> RefusedError:
    """What an engine refused a request with."""
    text = (await answer.aread()).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    return of_engine(answer.status_code, body, text)


async def events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream.

    Raises:
        RefusedError: one of them tells of an error.
    """
    async for sent in httpx2.EventSource(answer):
        if sent.data == "[DONE]":
            continue
        event = json.loads(sent.data)
        if "error" in event:
            raise of_engine(500, event, sent.data)
        yield event


def has_text(event: dict[str, Any]) -> bool:
    """Whether an event has the first text of an answer, or of a thought."""
    choices = event.get("choices") or ()
    texts = [choice.get("text") or choice.get("delta") or {} for choice in choices]
    return any(text if isinstance(text, str) else any(text.get(name) for name in TEXTS) for text in texts)
