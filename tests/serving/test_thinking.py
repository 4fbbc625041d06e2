"""Events, thoughts and answers are told apart however a stream is cut."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any, AnyStr

import httpx2
from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.serving.answering import Translation, joined
from autoglm_compress.serving.asking import Reasoning
from autoglm_compress.serving.events import events
from autoglm_compress.serving.thinking import ThoughtSplitter

TEXT = st.text(alphabet="<>/think \nab", max_size=30)


def cut(text: AnyStr, places: list[int]) -> list[AnyStr]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(text=st.text(max_size=40), places=st.lists(st.integers(0, 999)))
def test_events_come_whole_however_a_stream_is_cut(text: str, places: list[int]) -> None:
    """Whatever is in a text: there are characters that Python takes for the end of a line, and events do not."""
    event = {"choices": [{"index": 0, "text": text}]}
    data = f": ping\n\ndata: {json.dumps(event, ensure_ascii=False)}\n\ndata: [DONE]\n\n".encode()

    class Cut(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in cut(data, places):
                yield piece

    async def read() -> list[dict[str, Any]]:
        answer = httpx2.Response(
            200,
            headers={"content-type": "text/event-stream"},
            stream=Cut(),
            request=httpx2.Request("POST", "http://engine"),
        )
        return [found async for found in events(answer)]

    assert asyncio.run(read()) == [event]


def slow_split(text: str) -> tuple[str, str]:
    """Of the whole text at once."""
    begun = text.lstrip()
    if not begun.startswith("<think>"):
        return "", text
    thought, _, answer = begun.removeprefix("<think>").partition("</think>")
    return thought, answer


@given(thought=TEXT, answer=TEXT, opens=st.booleans(), closes=st.booleans(), places=st.lists(st.integers(0, 99)))
def test_the_cuts_do_not_matter(thought: str, answer: str, opens: bool, closes: bool, places: list[int]) -> None:
    text = "<think>" * opens + thought + "</think>" * closes + answer
    splitter = ThoughtSplitter()
    parts = [splitter.feed(piece) for piece in cut(text, places)] + [splitter.end()]
    assert tuple("".join(part) for part in zip(*parts, strict=True)) == slow_split(text)


@given(thought=TEXT, answer=TEXT, places=st.lists(st.integers(0, 99)), engine_splits=st.booleans())
def test_a_stream_joined_is_the_whole_answer(thought: str, answer: str, places: list[int], engine_splits: bool) -> None:
    """Whichever of the three wishes, and whether or not the engine tells thoughts apart."""
    if engine_splits:
        deltas = [{"reasoning": piece} for piece in cut(thought, places)]
        deltas += [{"content": piece} for piece in cut(answer, places)]
        message = {"reasoning": thought, "content": answer}
    else:
        whole = f"<think>{thought}</think>{answer}"
        deltas, message = [{"content": piece} for piece in cut(whole, places)], {"content": whole}
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    for wish in Reasoning:
        whole_answer = Translation("m", wish, not engine_splits).whole(
            {"choices": [{"index": 0, "message": dict(message), "finish_reason": "stop"}]}
        )
        translation = Translation("m", wish, not engine_splits)
        found = joined(translation.piece(event) for event in events)
        expected = {"content": "", "role": "assistant"} | whole_answer["choices"][0]["message"]
        assert found["choices"][0]["message"] == expected
