"""`benchmark`: what a person with the device would feel, measured on an engine that nobody else asks."""

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from autoglm_compress.errors import UserError
from autoglm_compress.serving.engines import Engine
from autoglm_compress.serving.events import events, has_text, refusal_of
from autoglm_compress.serving.problems import RefusedError
from autoglm_compress.serving.supervisor import Supervisor

SAMPLE_SECONDS = 0.02


@dataclass
class Measured:
    """Values of several starts; of a prompt, its tokens as the engine counted them."""

    load_seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: list[float] = field(default_factory=list)
    prompts: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Median, least and most of each."""
        prompts = []
        for tokens, values in sorted(self.prompts.items()):
            first, rate = zip(*values, strict=True)
            spread = {"first_token_seconds": _spread(first), "tokens_per_second": _spread(rate)}
            prompts.append({"prompt_tokens": tokens} | spread)
        return {
            "load_seconds": _spread(self.load_seconds),
            "peak_rss_bytes": _spread(self.peak_rss_bytes),
            "prompts": prompts,
        }


def measure(
    engine: Engine, prompts: Sequence[int], new_tokens: int, starts: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Start an engine several times; each time, send prompts and read the answers token by token.

    Args:
        engine: who answers.
        prompts: their lengths in tokens. Each begins with other text, so that no cache of an earlier one helps.
        new_tokens: of each answer.
        starts: how often the engine is started.
        note: shows a line to the user.

    Returns:
        Seconds from the start to the first token, the peak of resident memory of all processes of the engine, and for
        each prompt seconds to the first token and tokens per second after it: median, least and most of all starts.

    Raises:
        UserError: the engine does not start, or refuses a prompt.
    """
    measured = Measured()
    for number in range(starts):
        asyncio.run(_one_start(engine, prompts, new_tokens, measured, note))
        note(f"start {number + 1} of {starts}: loaded in {measured.load_seconds[-1]:.2f} s")
    return {"engine": engine.name, "new_tokens": new_tokens, "starts": starts} | measured.as_data()


async def _one_start(
    engine: Engine, prompts: Sequence[int], new_tokens: int, measured: Measured, note: Callable[[str], None]
) -> None:
    supervisor, peak = Supervisor(engine, note), _Peak()
    watching = asyncio.ensure_future(peak.watch(supervisor))
    began = time.monotonic()
    try:
        async with supervisor:
            measured.load_seconds.append(time.monotonic() - began)
            for length in prompts:
                tokens, first, rate = await _ask(supervisor, length, new_tokens)
                measured.prompts.setdefault(tokens, []).append((first, rate))
    finally:
        watching.cancel()
    measured.peak_rss_bytes.append(peak.bytes)


async def _ask(supervisor: Supervisor, length: int, new_tokens: int) -> tuple[int, float, float]:
    """Tokens of a prompt, seconds to the first token of the answer, and tokens per second after it."""
    engine, client = supervisor.engine, supervisor.client
    assert client is not None
    text = "".join(f" {digit}" for digit in str(secrets.randbelow(10**8)).zfill(8)[:length])
    body = {"model": engine.model, "prompt": text + " x" * (length - 8), "stream": True, **engine.exactly(new_tokens)}
    if engine.strict:
        body["stream_options"] = {"include_usage": True}
    began, first, last = time.monotonic(), 0.0, 0.0
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        try:
            if answer.status_code != 200:
                raise await refusal_of(answer)
            async for event in events(answer):
                usage = event.get("usage") or usage
                if has_text(event):
                    last = time.monotonic() - began
                    first = first or last
        except RefusedError as error:
            raise UserError(f"{engine.name} refuses a prompt of {length} tokens: {error}") from None
    if last <= first:
        raise UserError(f"{engine.name} answered a prompt of {length} tokens in one piece: give more --new-tokens.")
    return usage["prompt_tokens"], first, (usage["completion_tokens"] - 1) / (last - first)


class _Peak:
    """The most memory that all processes of an engine had at one time."""

    def __init__(self) -> None:
        self.bytes = 0.0

    async def watch(self, supervisor: Supervisor) -> None:
        """Look at it until cancelled."""
        while True:
            if supervisor.process_id is not None:
                with suppress(psutil.Error):
                    engine = psutil.Process(supervisor.process_id)
                    processes = [engine, *engine.children(recursive=True)]
                    self.bytes = max(self.bytes, sum(process.memory_info().rss for process in processes))
            await asyncio.sleep(SAMPLE_SECONDS)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
