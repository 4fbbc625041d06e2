"""What clients ask, turned into what an engine takes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from autoglm_compress.serving.engines import Engine
from autoglm_compress.serving.problems import RefusedError
from autoglm_compress.serving.target import Target

LIMITS = ("max_tokens", "max_completion_tokens")
"""The fields that bound an answer."""


class Reasoning(Enum):
    """Where a client wants what the model thinks before it answers."""

    field = "in `reasoning_content`, beside the answer"
    content = "between <think> and </think>, before the answer"
    nowhere = "left out"


WISHES = {None: Reasoning.field, True: Reasoning.field, "content": Reasoning.content, False: Reasoning.nowhere}
"""Values of `return_reasoning`."""


@dataclass(frozen=True)
class Request:
    """What the engine is asked, and what the client wants of the answer.

    `streams` and `wants_usage` are the client's wishes: the engine may be asked to stream, and for usage, regardless.
    """

    body: dict[str, Any]
    texts: tuple[str, ...]
    streams: bool
    wants_usage: bool
    reasoning: Reasoning


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        RefusedError: it is none.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body: expected a JSON object, found {type(body).__name__}.")
    return body


def chat_request(given: Mapping[str, Any], target: Target, engine: Engine, served_as: str, context: int) -> Request:
    """A request of `/v1/chat/completions`. `enable_thinking` and `return_reasoning` may stand at the top.

    Raises:
        RefusedError: the model has no chat template, or a field is not as it must be.
    """
    if target.chat_template is None:
        raise RefusedError(
            400,
            f"{served_as} has no chat template: use /v1/completions, or put the model's chat_template.jinja beside its "
            "tokenizer.",
        )
    body = dict(given)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise _wrong("messages", messages, "a list of messages")
    thinking, wish = body.pop("enable_thinking", None), body.pop("return_reasoning", None)
    if thinking is not None:
        if not isinstance(thinking, bool):
            raise _wrong("enable_thinking", thinking, "true or false")
        body["chat_template_kwargs"] = {"enable_thinking": thinking} | (body.get("chat_template_kwargs") or {})
    if not isinstance(wish, bool | str | None) or wish not in WISHES:
        raise _wrong("return_reasoning", wish, 'true, false or "content"')
    reasoning = WISHES[wish]
    if engine.takes_reasoning_field:
        body["include_reasoning"] = reasoning is not Reasoning.nowhere
    return _common(body, tuple(_texts(messages)), reasoning, engine, served_as, context)


def completion_request(given: Mapping[str, Any], engine: Engine, served_as: str, context: int) -> Request:
    """A request of `/v1/completions`.

    Raises:
        RefusedError: a field is not as it must be.
    """
    prompt = given.get("prompt")
    if not isinstance(prompt, str | list):
        raise _wrong("prompt", prompt, "a text")
    texts = tuple(part for part in ([prompt] if isinstance(prompt, str) else prompt) if isinstance(part, str))
    return _common(dict(given), texts, Reasoning.field, engine, served_as, context)


def _common(
    body: dict[str, Any], texts: tuple[str, ...], reasoning: Reasoning, engine: Engine, served_as: str, context: int
) -> Request:
    if body.get("model", served_as) != served_as:
        raise RefusedError(404, f"no model {body['model']!r} is served here: {served_as} is.", parameter="model")
    for name in LIMITS:
        most = body.get(name)
        if most is not None and not (isinstance(most, int) and 1 <= most <= context):
            raise _wrong(name, most, f"a whole number from 1 to {context}, the length of a text and its answer")
    streams, options = bool(body.get("stream")), body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    if isinstance(biases := body.get("logit_bias"), dict):  # transformers takes no whole numbers
        body["logit_bias"] = {token: float(bias) for token, bias in biases.items() if isinstance(bias, int | float)}
    body["model"] = engine.model
    body["stream"] = streams or not engine.strict
    if engine.strict and streams:
        body["stream_options"] = options | {"include_usage": True}
    return Request(body, texts, streams, bool(options.get("include_usage")), reasoning)


def bounded(request: Request, room: int) -> Request:
    """The same request, for an answer of so many tokens at most."""
    name = next((name for name in reversed(LIMITS) if request.body.get(name) is not None), LIMITS[0])
    most = min(request.body.get(name) or room, room)
    return replace(request, body=request.body | {name: most})


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    """All text in messages, also that beside images."""
    found = []
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        found += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return found


def _wrong(name: str, given: Any, expected: str) -> RefusedError:
    return RefusedError(400, f"{name}: given {str(given)[:60]!r}: expected {expected}.", parameter=name)
