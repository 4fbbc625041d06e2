"""A model without a chat template; an engine that is gone, a server that is told to end, a keeper that is killed."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from autoglm_compress.serving.measures import Measures
from autoglm_compress.serving.problems import RefusedError
from autoglm_compress.serving.relay import MOST_WAITING, Queue
from support.command_line import assert_says, refusal
from support.running import invoke
from support.serving import Server, serving

LONG: Any = {"prompt": "# user", "max_tokens": 1500, "temperature": 0, "logit_bias": {"0": -100}, "stream": True}
SECONDS = 30


@pytest.fixture(scope="module")
def gguf(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "exported"
    result = invoke("export", make_checkpoint("llama"), "--format", "gguf", "--output", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_up(server: Server) -> bool:
    return httpx2.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_is_killed_is_replaced_and_a_server_that_is_ended_drains(gguf: Path) -> None:
    with serving(gguf, "--served-model-name", "plain") as server:
        client = openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=SECONDS)
        answer = httpx2.post(f"{server.api}/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert answer.status_code == 400
        assert "no chat template: use /v1/completions" in answer.json()["error"]["message"]

        engine = server.engine()
        stream = iter(client.completions.create(model="plain", **LONG))
        next(stream)
        engine.kill()
        with pytest.raises(openai.APIError, match="the engine ended"):
            list(stream)

        until(lambda: not is_up(server))
        answer = httpx2.post(f"{server.api}/completions", json={"prompt": "# user"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "started again" in answer.json()["error"]["message"]
        until(lambda: is_up(server))
        assert server.engine().pid != engine.pid
        assert client.completions.create(model="plain", prompt="# user", max_tokens=4).usage.completion_tokens
        assert any("exit code -9" in line for line in server.lines)

        engine = server.engine()
        stream = iter(client.completions.create(model="plain", **LONG))
        next(stream)
        code: list[int] = []
        ender = threading.Thread(target=lambda: code.append(server.stop()))
        ender.start()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        ender.join()
        assert code == [128 + signal.SIGTERM]
        assert not engine.is_running()


def test_an_engine_that_does_not_take_the_file_has_the_last_word(gguf: Path, tmp_path: Path) -> None:
    [file] = gguf.glob("*.gguf")
    (tmp_path / "other.gguf").write_bytes(file.read_bytes().replace(b"llama", b"lemma"))
    message = refusal("serve", tmp_path / "other.gguf", "--port", 0)
    assert_says(message, "llama.cpp did not start", "lemma", "exit code")


def test_no_engine_outlives_a_killed_server(gguf: Path) -> None:
    with serving(gguf) as server:
        engine = server.engine()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(SECONDS)
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_the_queue_has_a_bound() -> None:
    async def fill() -> None:
        queue = Queue(1, Measures())
        async with queue.turn():
            waiting = [asyncio.ensure_future(queue.turn().__aenter__()) for _ in range(MOST_WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(RefusedError, match="wait already") as caught:
                await queue.turn().__aenter__()
            assert caught.value.status == 429
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        async with queue.turn():
            pass

    asyncio.run(fill())
