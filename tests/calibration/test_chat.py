"""Chat rows: what chat templates get is what transformers gives them, and what they refuse is one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.chat import DATE, chat_text, read_chat
from autoglm_compress.calibration.text import documents
from autoglm_compress.errors import UserError
from support.command_line import assert_says, refusal
from support.running import run, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# As Qwen3's and Llama 3.1's treat tools, calls and results of them.
TOOLS_AND_CALLS = """{% if tools %}TOOLS{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content if m.content is string }}
{%- for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""
KNOWS_PARTS = """{% for m in messages %}<{{ m.role }}>
{%- if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"""
NO_SYSTEM = (
    """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}""" + PLAIN
)
BROKEN = "{% for m in messages %}\n{{ m.content \n{% endfor %}"
READS_A_FIELD = "{% for m in messages %}{{ m.meta.language }}{{ m.content }}{% endfor %}"
ADDS_TEXT = "{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}"

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CALLING = [
    {"role": "user", "content": "天气?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "name": "weather"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Open "}, {"type": "text", "text": "the door."}]},
    {"role": "assistant", "content": "Done."},
]
JOINED = [{"role": "user", "content": "Open the door."}, {"role": "assistant", "content": "Done."}]


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def change(template: Any) -> PreTrainedTokenizerFast:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return change


def text_of(tokenizer: Any, **row: Any) -> str:
    return chat_text(tokenizer, read_chat(json.loads(json.dumps(row)), "chat.jsonl:1", Path()))


# What templates get


@pytest.mark.parametrize("template", [PLAIN, TOOLS_AND_CALLS, {"default": PLAIN, "tool_use": TOOLS_AND_CALLS}])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_calls_and_tools_go_through_the_template_as_transformers_takes_them(
    with_template: Callable, template: Any, tools: list | None
):
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(CALLING, tools=tools or None, tokenize=False, date_string=DATE)
    assert text_of(tokenizer, messages=CALLING, tools=tools) == expected
    knows = template is TOOLS_AND_CALLS or (isinstance(template, dict) and tools)
    assert ('CALL weather {"city": "北京"}' in expected) == bool(knows)
    assert expected.startswith("TOOLS") == bool(knows and tools)
    assert "None" not in expected


def test_a_call_need_not_have_content(with_template: Callable):
    without = [CALLING[0], {"role": "assistant", "tool_calls": [CALL]}]
    tokenizer = with_template(TOOLS_AND_CALLS)
    assert text_of(tokenizer, messages=without) == text_of(tokenizer, messages=CALLING[:2])


def test_without_a_template_calls_are_lines_of_json(with_template: Callable):
    text = text_of(with_template(None), messages=CALLING, tools=TOOLS)
    assert text.splitlines() == [
        "user: 天气?",
        "assistant: ",
        json.dumps(CALL, ensure_ascii=False),
        "tool: sunny",
    ]


def test_parts_of_text_go_to_a_template_that_knows_them(with_template: Callable):
    tokenizer = with_template(KNOWS_PARTS)
    expected = tokenizer.apply_chat_template(PARTS, tokenize=False)
    assert text_of(tokenizer, messages=PARTS) == expected == "<user>[Open ][the door.]<assistant>Done."


@pytest.mark.parametrize(
    "template", [None, PLAIN, TOOLS_AND_CALLS, ADDS_TEXT, PLAIN.replace("content", "content | tojson")]
)
def test_parts_of_text_are_one_text_to_other_templates(with_template: Callable, template: str | None):
    # One prints the list as Python does, one drops it, one cannot add it to a text.
    tokenizer = with_template(template)
    assert text_of(tokenizer, messages=PARTS) == text_of(tokenizer, messages=JOINED)


# What rows may hold


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"content": None}, ["messages[1].content: expected text, or null beside tool_calls: found null"]),
        ({"content": 3}, ["messages[1].content: expected text", "found 3"]),
        ({"content": {"text": "a"}}, ["messages[1].content: expected text", 'found {"text": "a"}']),
        ({"content": None, "tool_calls": []}, ["messages[1].content: ", "tool_calls"]),
        ({"tool_calls": "weather"}, ["messages[1].tool_calls: expected a list of objects", '"weather"']),
        ({"tool_calls": ["weather"]}, ["messages[1].tool_calls: expected a list of objects"]),
        ({"role": None}, ["messages[1].role: found null"]),
        ({"content": ["a"]}, ['messages[1].content[0]: expected {"type": "text", "text": …}, found "a"']),
        ({"content": [{"type": "text"}]}, ["messages[1].content[0].text: expected text, found null"]),
        (
            {"content": [{"type": "text", "text": "Look:"}, {"type": "video", "url": "a.mp4"}]},
            ["messages[1].content[1]: a part of type 'video'", "text, images and audio", "Leave such rows"],
        ),
        ({"content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, ["type 'image_url'"]),
        ({"content": [{"type": "input_audio"}]}, ["type 'input_audio'", "audio"]),
    ],
)
def test_a_message_that_cannot_be_is_named(change: dict[str, Any], words: list[str]):
    row = {"messages": [JOINED[0], {"role": "user", "content": "b"} | change]}
    with pytest.raises(UserError) as caught:
        read_chat(row, "chat.jsonl:7", Path())
    assert_says(str(caught.value), "chat.jsonl:7: expected", *words)


@pytest.mark.parametrize("tools", ["[{}]", {"name": "weather"}, ["weather"]])
def test_tools_that_cannot_be_are_named(tools: object):
    with pytest.raises(UserError, match=r"chat\.jsonl:7: tools: expected a list of JSON schemas, found "):
        read_chat({"messages": JOINED, "tools": tools}, "chat.jsonl:7", Path())


def test_tools_do_not_move_a_row_to_the_other_split(tmp_path: Path):
    rows = [[{"role": "user", "content": f"Question {number}"}] for number in range(40)]
    files = tmp_path / "plain.jsonl", tmp_path / "tools.jsonl"
    for file, more in zip(files, ({}, {"tools": TOOLS}), strict=True):
        file.write_text("".join(json.dumps({"messages": row} | more) + "\n" for row in rows))
    one, other = ([chat.messages for chat in documents(file, "held-out")] for file in files)
    assert one == other != []


# What templates refuse


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_SYSTEM, ["System role not supported", "Change the row"]),
        (BROKEN, ["not valid, line 3", "Correct it there"]),
        (READS_A_FIELD, ["'meta'", "no attribute", "Change the row"]),
        ("{{ messages[0].content.no_such() }}", ["no_such"]),
        ("{{ 1 // 0 }}", ["zero"]),
        ("{% for m in messages %}{{ m.content | no_filter }}{% endfor %}", ["no_filter"]),
    ],
)
def test_a_refusal_names_the_row_and_the_template_and_says_its_words(
    with_template: Callable, template: str, words: list[str]
):
    with pytest.raises(UserError) as caught:
        text_of(with_template(template), messages=[{"role": "system", "content": "Be kind."}, *JOINED])
    assert_says(str(caught.value), "chat.jsonl:1: the chat template in ", *words)


@pytest.fixture
def refusing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A model whose template takes no system message."""
    model = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(NO_SYSTEM)
    return model


def chats(file: Path, system_at: int | None, rows: int = 300) -> Path:
    """Chat rows, one of them with a system message."""
    system = [{"role": "system", "content": "Be kind."}]
    with file.open("w") as out:
        for number in range(rows):
            turn = [{"role": "user", "content": f"Question {number} of the day, please?"}]
            out.write(json.dumps({"messages": (system if number == system_at else []) + turn}) + "\n")
    return file


DEPTH = {"stage": "depth", "num_hidden_layers": 2}
QUANTIZE = {"stage": "quantize", "bits": 8, "group_size": 32, "method": "round_to_nearest"}
HEAL = {"stage": "heal", "tokens": 64, "batch_size": 1, "checks": 1}


@pytest.mark.parametrize("stage", [DEPTH, QUANTIZE, HEAL], ids=lambda stage: stage["stage"])
@pytest.mark.parametrize("at", [0, 299])
def test_plan_and_run_name_the_row_before_work_starts(refusing: Path, tmp_path: Path, stage: dict, at: int):
    text = chats(tmp_path / "chat.jsonl", system_at=at)
    calibration = {"source": str(text), "samples": 2, "sequence_length": 32}
    recipe = write_recipe(tmp_path, refusing, [stage], calibration=calibration)
    for command in (["plan", recipe], ["run", recipe, "--output", tmp_path / "out"]):
        message = refusal(*command)
        assert_says(message, f"{text}:{at + 1}: ", refusing / "chat_template.jinja", "System role not supported")
    assert not (tmp_path / "out").exists()


def test_the_text_of_perplexity_is_read_before_work_starts(refusing: Path, tmp_path: Path):
    text = chats(tmp_path / "chat.jsonl", system_at=20)
    evaluation = {
        "every_stage": ["perplexity"],
        "perplexity": {"source": str(text), "samples": 1, "sequence_length": 32},
    }
    recipe = write_recipe(tmp_path, refusing, [DEPTH], evaluation=evaluation)
    for command in (["plan", recipe], ["run", recipe, "--output", tmp_path / "out"]):
        assert_says(refusal(*command), f"{text}:21: ", "System role not supported")
    assert not (tmp_path / "out").exists()
    write_recipe(tmp_path, refusing, [DEPTH], evaluation=evaluation | {"every_stage": []})  # nothing measured on it
    run(recipe)


def test_evaluate_names_the_row(refusing: Path, tmp_path: Path):
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    text = chats(tmp_path / "chat.jsonl", system_at=None)
    arguments = ("--text", text, "--samples", 2, "--sequence-length", 32, "--output", tmp_path / "out.json")
    for more in ((), ("--against", refusing)):
        message = refusal("evaluate", refusing, "--tasks", "perplexity", *arguments, *more)
        assert_says(message, f"{text}:", refusing / "chat_template.jinja", "no user")
    assert not (tmp_path / "out.json").exists()


def test_the_template_for_tools_is_named_where_it_refuses(refusing: Path, tmp_path: Path):
    file = refusing / "additional_chat_templates" / "tool_use.jinja"
    file.parent.mkdir()
    file.write_text(BROKEN)
    row = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS}
    text = tmp_path / "chat.jsonl"
    text.write_text((json.dumps(row) + "\n") * 40)
    recipe = write_recipe(
        tmp_path, refusing, [DEPTH], calibration={"source": str(text), "samples": 1, "sequence_length": 8}
    )
    assert_says(refusal("plan", recipe), f"{text}:1: the chat template in {file} is not valid, line 3")
