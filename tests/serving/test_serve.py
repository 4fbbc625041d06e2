"""`serve` with real engines: transformers for a checkpoint, llama.cpp for its GGUF file, driven by real clients."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from langchain_openai import ChatOpenAI

from support.command_line import assert_says
from support.running import invoke
from support.serving import Server, serving
from support.thinker import ANSWER, ASKED, THOUGHT

KEY = "a-key-for-tests"
NAME = "autoglm-phone-9b"
QUESTION = ASKED[0]
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
ENDLESS: Any = {"logit_bias": {"0": -100}, "max_tokens": 8000}
"""An answer that does not end where the model would end it."""


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"another-key\n\n{KEY}\n")
    return file


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def server(request: pytest.FixtureRequest, key_file: Path) -> Iterator[Server]:
    model = request.getfixturevalue("thinker" if request.param == "transformers" else "thinker_gguf")
    with serving(model, "--engine", request.param, "--served-model-name", NAME, "--api-key-file", key_file) as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api, api_key=KEY, max_retries=0, timeout=60)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 64}
    return client.chat.completions.create(**(settings | more))


def streamed(client: openai.OpenAI, **more: Any) -> tuple[list[str], str]:
    """The pieces of the answer, and what was thought."""
    pieces, thought = [], ""
    for event in chat(client, stream=True, **more):
        for choice in event.choices:
            pieces += [choice.delta.content] if choice.delta.content else []
            thought += getattr(choice.delta, "reasoning_content", None) or ""
    return pieces, thought


def metric(server: Server, name: str) -> float:
    text = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_says_that_it_is_ready_when_it_is(server: Server) -> None:
    assert server.lines[-2:] == [
        f"Model {NAME} is ready for inference",
        f"Uvicorn running on {server.url} (Press CTRL+C to quit)",
    ]
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok", "model": NAME}


def test_answers_with_and_without_thoughts(client: openai.OpenAI) -> None:
    answer = chat(client)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (ANSWER, THOUGHT)
    assert (answer.model, answer.choices[0].finish_reason) == (NAME, "stop")
    assert answer.usage.completion_tokens > 0

    quiet = chat(client, extra_body={"enable_thinking": False}).choices[0].message
    assert (quiet.content, getattr(quiet, "reasoning_content", None)) == (ANSWER, None)

    left_out = chat(client, extra_body={"return_reasoning": False}).choices[0].message
    assert (left_out.content, getattr(left_out, "reasoning_content", None)) == (ANSWER, None)

    inside = chat(client, extra_body={"return_reasoning": "content"}).choices[0].message
    assert inside.content == f"<think>{THOUGHT}</think>{ANSWER}"


def test_streams_say_the_same(client: openai.OpenAI) -> None:
    pieces, thought = streamed(client)
    assert ("".join(pieces), thought) == (ANSWER, THOUGHT)
    assert len(pieces) > 3

    pieces, thought = streamed(client, extra_body={"return_reasoning": "content"})
    assert ("".join(pieces), thought) == (f"<think>{THOUGHT}</think>{ANSWER}", "")

    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert [event.usage.completion_tokens > 0 for event in events if event.usage] == [True]


def test_the_client_of_the_article(server: Server) -> None:
    wanted = {"enable_thinking": True, "return_reasoning": "content"}
    model = ChatOpenAI(base_url=server.api, api_key=KEY, model=NAME, temperature=0, max_tokens=64, extra_body=wanted)

    assert model.invoke(QUESTION).content == f"<think>{THOUGHT}</think>{ANSWER}"
    assert "".join(piece.content for piece in model.stream(QUESTION)) == f"<think>{THOUGHT}</think>{ANSWER}"


def test_texts_are_continued(client: openai.OpenAI) -> None:
    prompt = f"\n# user\n{QUESTION}\n# assistant\n<think></think>"
    answer = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=64)
    assert answer.choices[0].text == ANSWER
    stream = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=64, stream=True)
    assert "".join(event.choices[0].text for event in stream if event.choices) == ANSWER


def test_many_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tokens: chat(client, max_tokens=tokens), range(1, 9)))
    assert [answer.usage.completion_tokens for answer in answers] == list(range(1, 9))
    assert len({answer.id for answer in answers}) == 8


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {}])
def test_only_those_with_a_key_are_answered(server: Server, headers: dict[str, str]) -> None:
    for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics"):
        assert httpx2.get(server.url + path, headers=headers).status_code == 401
    answer = httpx2.post(f"{server.api}/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 401
    assert "key" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", b"{", 400, "not JSON"),
        ("chat/completions", b"[]", 400, "expected a JSON object"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": MESSAGES, "model": "other"}, 404, NAME),
        ("chat/completions", {"messages": MESSAGES, "enable_thinking": "yes"}, 400, "enable_thinking"),
        ("chat/completions", {"messages": MESSAGES, "return_reasoning": "aloud"}, 400, "return_reasoning"),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 10**6}, 400, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": " x" * 9000}]}, 400, "tokens"),
        ("completions", {"prompt": 3}, 400, "prompt"),
        ("completions", {"prompt": " x" * 9000}, 400, "tokens"),
        ("completions", b" " * (33 << 20), 413, "32 MiB"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    server: Server, path: str, body: Any, status: int, words: str
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx2.post(f"{server.api}/{path}", content=data, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_verify_finds_all_well(server: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    result = invoke("verify", "--base-url", server.api, "--api-key-file", tmp_path / "key")
    found = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert result.exit_code == 0, result.output
    assert_says(found["thinking"], "pass", f"{len(THOUGHT)} characters of reasoning")
    assert_says(found["at once"], "pass", "8 of 8")
    assert_says(found["wrong key"], "pass", "401")
    assert_says(found["too long"], "pass", "400")
    assert "skip" not in result.output


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_nobody_waits_for_is_not_generated(server: Server, client: openai.OpenAI, stream: bool) -> None:
    cancelled = metric(server, "autoglm_cancelled_requests_total")
    if stream:
        with chat(client, stream=True, **ENDLESS) as events:
            next(iter(events))
    else:
        with pytest.raises(openai.APITimeoutError):
            chat(client.with_options(timeout=0.3), **ENDLESS)
    wait_for(lambda: metric(server, "autoglm_cancelled_requests_total") == cancelled + 1)
    assert metric(server, "autoglm_running_requests") == 0
    began = time.monotonic()
    assert chat(client).choices[0].message.content == ANSWER
    assert time.monotonic() - began < 5


def test_measures(server: Server, client: openai.OpenAI) -> None:
    names = ("autoglm_generated_tokens_total", "autoglm_first_token_seconds_count", "autoglm_requests_total")
    before = [metric(server, name) for name in names]
    pieces, _ = streamed(client)
    assert len(pieces) > 1
    after = [metric(server, name) for name in names]
    assert after[0] - before[0] >= len(pieces)
    assert [after[1] - before[1], after[2] - before[2]] == [1, 1]
    assert metric(server, "autoglm_engine_up") == 1
