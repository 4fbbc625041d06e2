"""What happens when an engine is gone, when the server is told to end, and when its keeper is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from support.serving import Server, serving

LONG = {"prompt": "# user", "max_tokens": 1500, "temperature": 0, "logit_bias": {"0": -100}, "stream": True}
SECONDS = 30


def until(condition: object, seconds: float = SECONDS) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_up(server: Server) -> bool:
    return httpx2.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_is_killed_is_replaced_and_a_server_that_is_ended_drains(thinker_gguf: Path) -> None:
    with serving(thinker_gguf, "--served-model-name", "thinker") as server:
        client = openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=SECONDS)
        engine = server.engine()
        stream = iter(client.completions.create(model="thinker", **LONG))
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
        assert client.completions.create(model="thinker", prompt="# user", max_tokens=4).usage.completion_tokens
        assert any("exit code -9" in line for line in server.lines)

        engine = server.engine()
        stream = iter(client.completions.create(model="thinker", **LONG))
        next(stream)
        code: list[int] = []
        ender = threading.Thread(target=lambda: code.append(server.stop()))
        ender.start()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        ender.join()
        assert code == [128 + signal.SIGTERM]
        assert not engine.is_running()


def test_no_engine_outlives_a_killed_server(thinker_gguf: Path) -> None:
    with serving(thinker_gguf) as server:
        engine = server.engine()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(SECONDS)
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
