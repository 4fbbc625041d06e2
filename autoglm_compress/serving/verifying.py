"""`verify`: what a client finds at a server of OpenAI's API, asked by OpenAI's own client."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import httpx2
import openai

from autoglm_compress.errors import in_one_line
from autoglm_compress.serving.client import Client

PROMPT = "Return the number of items in a container."
TOKENS = 32
AT_ONCE = 8
REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)


class Result(Enum):
    """How a check ended."""

    passed = "pass"
    failed = "FAIL"
    skipped = "skip"


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    result: Result
    detail: str


def verify(base_url: str, model: str | None, key: str | None) -> list[Check]:
    """Ask a server all that a client relies on.

    Args:
        base_url: of the API, such as `http://127.0.0.1:8000/v1`.
        model: what it is called there; the first that the server lists by default.
        key: for the server.

    Raises:
        UserError: the server cannot be reached.
    """
    client = Client.connected(base_url, model, key)
    checks = (_health, _models, _plain, _streaming, _thinking, _at_once, _wrong_key, _too_long)
    return [_checked(check, client) for check in checks]


def _checked(check: Callable[[Client], Check], client: Client) -> Check:
    """What a check finds; an answer that it did not expect is a failure."""
    try:
        return check(client)
    except (openai.OpenAIError, httpx2.HTTPError) as error:
        return Check(check.__name__.strip("_").replace("_", " "), Result.failed, in_one_line(error))


def _health(client: Client) -> Check:
    answer = httpx2.get(f"{client.base_url.removesuffix('/v1')}/health", timeout=10)
    result = Result.passed if answer.status_code == 200 else Result.failed
    return Check("health", result, f"HTTP {answer.status_code}")


def _models(client: Client) -> Check:
    names = [model.id for model in client.api.models.list()]
    result = Result.passed if client.model in names else Result.failed
    return Check("models", result, ", ".join(names))


def _plain(client: Client) -> Check:
    began = time.monotonic()
    answer = client.ask(PROMPT, TOKENS)
    result = Result.passed if answer.tokens else Result.failed
    return Check("plain", result, f"{answer.tokens} tokens in {time.monotonic() - began:.2f} s, {client.endpoint}")


def _streaming(client: Client) -> Check:
    heard = client.listen(PROMPT, TOKENS)
    if heard.first_token is None:
        return Check("streaming", Result.failed, "no text came")
    detail = f"first token after {1000 * heard.first_token:.0f} ms, then {heard.tokens_per_second:.1f} tokens/s"
    return Check("streaming", Result.passed if heard.pieces > 1 else Result.failed, detail)


def _thinking(client: Client) -> Check:
    if not client.chats:
        return Check("thinking", Result.skipped, "the model has no chat template")
    on = client.ask(PROMPT, TOKENS, enable_thinking=True, return_reasoning=True)
    off = client.ask(PROMPT, TOKENS, enable_thinking=False, return_reasoning=True)
    if off.reasoning:
        return Check("thinking", Result.failed, "it thinks though enable_thinking is false")
    if not on.reasoning:
        return Check("thinking", Result.skipped, "both are taken; the model does not think")
    return Check("thinking", Result.passed, f"{len(on.reasoning)} characters of reasoning, none if it is off")


def _at_once(client: Client) -> Check:
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda number: client.ask(f"{number}. {PROMPT}", TOKENS), range(AT_ONCE)))
    whole = sum(bool(answer.tokens) for answer in answers)
    detail = f"{whole} of {AT_ONCE} answered in {time.monotonic() - began:.2f} s"
    return Check("at once", Result.passed if whole == AT_ONCE else Result.failed, detail)


def _wrong_key(client: Client) -> Check:
    try:
        client.api.with_options(api_key="not-a-key").models.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        return Check("wrong key", Result.passed, f"HTTP {error.status_code}")
    return Check("wrong key", Result.skipped, "the server asks for no key")


def _too_long(client: Client) -> Check:
    if client.context is None:
        return Check("too long", Result.skipped, "the server does not tell how much it reads")
    try:
        client.ask(" x" * (client.context + 1), 1)
    except openai.APIStatusError as error:
        refused = isinstance(error, REFUSED) or error.status_code == 413
        detail = f"HTTP {error.status_code} for more than {client.context} tokens"
        return Check("too long", Result.passed if refused else Result.failed, detail)
    return Check("too long", Result.failed, f"more than {client.context} tokens were answered")
