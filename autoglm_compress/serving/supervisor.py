"""The process of an engine: started, asked for a token, started again when it ends, and stopped."""

import asyncio
import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

import httpx2

from autoglm_compress.errors import UserError
from autoglm_compress.serving.engines import HOST, Engine

POLL_SECONDS = 0.1
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before an engine is started again; each failure doubles them."""
STEADY_SECONDS = 60.0
"""An engine that ran so long is started again after the first pause."""
LONGEST_ANSWER_SECONDS = 3600.0
"""Between two pieces of an answer, of which a whole one has a single piece."""
STOP_SECONDS = 10.0
LAST_LINES = 40
"""Of what an engine says, for a message about its end."""


class EngineEndedError(Exception):
    """An engine ended before it gave a token; the message has its last words."""


class Supervisor:
    """A context manager that keeps one engine running. It is entered when the engine has given its first token.

    Raises:
        UserError: on entering, if the engine ends before that.
    """

    def __init__(self, engine: Engine, note: Callable[[str], None]) -> None:
        self.engine = engine
        self.restarts = 0
        self._note = note
        self._key = secrets.token_urlsafe(32)
        self._client: httpx2.AsyncClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def client(self) -> httpx2.AsyncClient | None:
        """A client of the engine; None while it is not there."""
        return self._client

    @property
    def process_id(self) -> int | None:
        """Of the engine."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> "Supervisor":
        try:
            await self._start()
        except EngineEndedError as error:
            await self._stop()
            raise UserError(f"{self.engine.name} did not start: {error}") from None
        except BaseException:
            await self._stop()
            raise
        self._watch(self._keep_running())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start(self) -> None:
        """Start the engine, and return when it has given a token."""
        port = _free_port()
        launch = self.engine.launch(port, self._key)
        self._said.clear()
        self._process = await asyncio.create_subprocess_exec(
            *launch.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | launch.environment,
            start_new_session=True,  # Ctrl-C is for the gateway, which lets the engine finish
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        listening = self._watch(self._listen(self._process.stdout))
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(launch.job.encode())
            await self._process.stdin.drain()
        self._process.stdin.close()
        client = httpx2.AsyncClient(
            base_url=f"http://{HOST}:{port}",
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx2.Timeout(LONGEST_ANSWER_SECONDS, connect=5, pool=None),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )
        try:
            while not await self._gives_token(client):
                if self._process.returncode is not None:
                    await asyncio.wait({listening}, timeout=1)
                    raise EngineEndedError(self._last_words())
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            await client.aclose()
            raise
        self._client = client

    async def _gives_token(self, client: httpx2.AsyncClient) -> bool:
        body = {"model": self.engine.model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        try:
            answer = await client.post("/v1/completions", json=body)
            return answer.status_code == 200 and bool(answer.json()["choices"])
        except (httpx2.HTTPError, ValueError, KeyError):
            return False

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        """Read what the engine says, so that it never waits for a reader."""
        rest = ""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data.decode(errors="replace"))[-(1 << 16) :].split("\n")
            self._said.extend(line for line in lines if line.strip())
        if rest.strip():
            self._said.append(rest)

    def _last_words(self) -> str:
        code = self._process.returncode if self._process else None
        lines = [line.strip() for line in self._said]
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        errors = [line for line in lines if "error" in line.lower()]
        told = raised[-1:] or errors[:1] or lines[-1:] or ["no message"]
        return f"{told[0][:500]} (exit code {code})"

    async def _keep_running(self) -> None:
        pause = FIRST_PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            assert self._process is not None
            await self._process.wait()
            await self._forget_client()
            _signal_group(self._process.pid, signal.SIGKILL)  # processes that it has left behind
            if asyncio.get_running_loop().time() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            self._note(f"{self.engine.name} ended: {self._last_words()}; it is started again in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            self.restarts += 1
            try:
                await self._start()
            except (EngineEndedError, OSError) as error:
                self._note(f"{self.engine.name} did not start: {error}")
            else:
                self._note(f"{self.engine.name} is back")

    async def _forget_client(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def _stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._forget_client()
        if self._process is None:
            return
        if self._process.returncode is not None:
            _signal_group(self._process.pid, signal.SIGKILL)
            return
        _signal_group(self._process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError:
            _signal_group(self._process.pid, signal.SIGKILL)
            await self._process.wait()


def _signal_group(leader: int, number: signal.Signals) -> None:
    """Send a signal to an engine and to the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _end_with_parent() -> None:
    """Have Linux end this process with its parent, also when that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
