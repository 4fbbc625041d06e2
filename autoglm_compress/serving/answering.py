"""What an engine answers, turned into what clients are given."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from autoglm_compress.serving.asking import Reasoning
from autoglm_compress.serving.thinking import CLOSE, OPEN, ThoughtSplitter

FIELDS = ("reasoning", "reasoning_content")
"""Where engines put what a model thinks."""


class Translation:
    """The answer to one request, in pieces or whole.

    Args:
        name: what the model is called.
        reasoning: where the client wants what the model thinks.
        in_text: whether the engine may leave that in the text.
    """

    def __init__(self, name: str, reasoning: Reasoning, in_text: bool) -> None:
        self._name = name
        self._reasoning = reasoning
        self._in_text = in_text
        self._splitters: dict[int, ThoughtSplitter] = {}
        self._open: set[int] = set()

    def piece(self, event: dict[str, Any]) -> dict[str, Any]:
        """An event of a stream, whose choices have a `delta` or a `text`."""
        return self._translated(event, "delta")

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer in one piece, whose choices have a `message` or a `text`."""
        return self._translated(answer, "message")

    def _translated(self, answer: dict[str, Any], part: str) -> dict[str, Any]:
        answer = deepcopy(answer) | {"model": self._name}
        for place, choice in enumerate(answer.get("choices") or ()):
            index = choice.get("index", place)
            if isinstance(choice.get(part), dict):
                self._place(choice[part], index, bool(choice.get("finish_reason")))
        return answer

    def _place(self, part: dict[str, Any], index: int, last: bool) -> None:
        """Put thought and answer of a message, or of a part of one, where the client wants them."""
        told = [part.pop(name, None) for name in FIELDS]
        thought = next((text for text in told if text), "")
        answer = part.get("content") or ""
        if self._in_text:
            splitter = self._splitters.setdefault(index, ThoughtSplitter())
            thought_in_text, answer_in_text = splitter.feed(answer)
            if last:
                held_thought, held_answer = splitter.end()
                thought_in_text, answer_in_text = thought_in_text + held_thought, answer_in_text + held_answer
            thought, answer = thought + thought_in_text, answer_in_text
        if self._reasoning is Reasoning.field and thought:
            part["reasoning_content"] = thought
        if self._reasoning is Reasoning.content:
            answer = self._marked(thought, answer, index, last)
        if answer or part.get("content"):
            part["content"] = answer

    def _marked(self, thought: str, answer: str, index: int, last: bool) -> str:
        """Thought between markers and answer after them, of which the opening one may have come before."""
        opened = index in self._open
        before = OPEN if thought and not opened else ""
        if thought:
            self._open.add(index)
        closes = index in self._open and (answer or last)
        if closes:
            self._open.discard(index)
        return before + thought + (CLOSE if closes else "") + answer


def joined(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer that the events of a stream with one choice make."""
    found: dict[str, Any] = {}
    message: dict[str, Any] = {}
    text, is_chat, reason, usage = "", False, None, None
    for event in events:
        found = found or {name: event[name] for name in ("id", "created", "model") if name in event}
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            text += choice.get("text") or ""
            is_chat = is_chat or "delta" in choice
            _add(message, choice.get("delta") or {})
    choice = {"index": 0, "finish_reason": reason or "stop"}
    if is_chat:
        choice["message"] = {"role": "assistant", "content": ""} | message
        kind = "chat.completion"
    else:
        choice["text"], kind = text, "text_completion"
    return found | {"object": kind, "choices": [choice]} | ({"usage": usage} if usage else {})


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if isinstance(value, str) and name != "role":
            message[name] = message.get(name, "") + value
        elif isinstance(value, list):
            message[name] = message.get(name, []) + value
        elif value is not None:
            message[name] = value
