"""One request on its way to the engine and back: it waits for its turn, and ends when its client is gone."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from autoglm_compress.serving.answering import Translation, joined
from autoglm_compress.serving.asking import Request
from autoglm_compress.serving.events import events, has_text, refusal_of
from autoglm_compress.serving.measures import Measures
from autoglm_compress.serving.problems import RefusedError, unavailable
from autoglm_compress.serving.supervisor import Supervisor

MOST_WAITING = 64
DONE = b"data: [DONE]\n\n"
GONE = "the engine ended; it is being started again. Ask again in a few seconds."


class Queue:
    """Lets as many requests through as the engine works on at the same time; others wait, to a bound."""

    def __init__(self, slots: int, measures: Measures) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._waiting = 0
        self._measures = measures

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a slot, and keep it.

        Raises:
            RefusedError: too many wait already.
        """
        if self._waiting >= MOST_WAITING:
            raise RefusedError(429, f"{MOST_WAITING} requests wait already. Ask again later.", "rate_limit_error")
        self._waiting += 1
        self._measures.waiting.inc()
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
            self._measures.waiting.dec()
        self._measures.running.inc()
        try:
            yield
        finally:
            self._slots.release()
            self._measures.running.dec()


class Relay(Response):
    """An answer that an engine gives. The engine's connection is closed when the client is gone, which cancels it.

    Args:
        endpoint: of the engine, such as `/v1/completions`.
        request: what it is asked.
        supervisor: keeps the engine.
        queue: where the request waits.
        translation: of the answer.
        measures: where it is counted.
    """

    def __init__(
        self,
        endpoint: str,
        request: Request,
        supervisor: Supervisor,
        queue: Queue,
        translation: Translation,
        measures: Measures,
    ) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._request = request
        self._supervisor = supervisor
        self._queue = queue
        self._translation = translation
        self._measures = measures
        self._began = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client is gone first."""

        async def reply(response: Response) -> None:
            self._measures.requests.labels(self._endpoint, response.status_code).inc()
            await response(scope, receive, send)

        work = asyncio.ensure_future(self._work(reply, send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                self._measures.cancelled.inc()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _work(self, reply: Callable[[Response], Awaitable[None]], send: Send) -> None:
        try:
            async with self._queue.turn():
                client = self._supervisor.client
                if client is None:
                    raise unavailable(GONE)
                async with client.stream("POST", self._endpoint, json=self._request.body) as answer:
                    if answer.status_code != 200:
                        raise await refusal_of(answer)
                    if self._request.streams:
                        await self._stream(answer, send)
                    else:
                        await reply(await self._whole(answer))
        except RefusedError as refusal:
            await reply(refused(refusal))
        except httpx2.TimeoutException:
            await reply(refused(RefusedError(504, "the engine said nothing for too long.", "server_error")))
        except (httpx2.HTTPError, httpx2.StreamError):
            await reply(refused(unavailable(GONE)))

    async def _whole(self, answer: httpx2.Response) -> Response:
        if self._request.body["stream"]:
            found = joined([event async for event in events(answer)])
        else:
            await answer.aread()
            found = answer.json()
        self._measures.count_usage(found.get("usage"))
        return JSONResponse(self._translation.whole(found))

    async def _stream(self, answer: httpx2.Response, send: Send) -> None:
        """Send each event on when it comes. What goes wrong after the first is an event too."""
        self._measures.requests.labels(self._endpoint, 200).inc()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        seen = False
        try:
            async for event in events(answer):
                if not seen and has_text(event):
                    seen = True
                    self._measures.first_token.observe(time.monotonic() - self._began)
                self._measures.count_usage(event.get("usage"))
                if event.get("choices") or self._request.wants_usage:
                    await _send_event(send, self._translation.piece(event))
        except RefusedError as refusal:
            await _send_event(send, refusal.as_data())
        except (httpx2.HTTPError, httpx2.StreamError):
            await _send_event(send, unavailable(GONE).as_data())
        await send({"type": "http.response.body", "body": DONE})


def refused(refusal: RefusedError) -> Response:
    """A refusal as an answer."""
    return JSONResponse(refusal.as_data(), refusal.status, refusal.headers)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, event: dict[str, Any]) -> None:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
    await asyncio.sleep(0)  # events may come without a pause, in which nobody would notice that the client is gone
