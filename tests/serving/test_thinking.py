"""Thoughts and answers in one text are told apart however the text is cut; requests and answers are translated."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.serving.answering import Translation, joined
from autoglm_compress.serving.asking import Reasoning
from autoglm_compress.serving.thinking import ThoughtSplitter

TEXT = st.text(alphabet="<>/think \nab", max_size=30)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


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
