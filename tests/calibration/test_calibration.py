"""Calibration text: what is read, how it is split for good, and how it becomes rows of tokens."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration import python_docs
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.text import PYTHON_DOCS, documents, locate, shuffled
from autoglm_compress.calibration.tokens import BATCH_TOKENS, batched, token_rows
from autoglm_compress.errors import UserError

MESSAGES = [{"role": "user", "content": "打开设置"}, {"role": "assistant", "content": "Opening the settings."}]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def both(path: Path | None) -> tuple[list, list]:
    return documents(path, "calibration"), documents(path, "held-out")


# Reading


def test_jsonl_gives_its_texts_and_messages_in_order(tmp_path: Path):
    rows = [{"text": f"row {number}", "id": number} for number in range(60)] + [{"messages": MESSAGES}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n", 3), encoding="utf-8")  # blank lines
    calibration, held_out = both(path)
    assert len(calibration) + len(held_out) == 61
    assert 1 <= len(held_out) <= 15
    [chat] = [document for document in calibration + held_out if not isinstance(document, str)]
    assert (chat.messages, chat.tools) == (MESSAGES, None)
    texts = [document for document in calibration + held_out if isinstance(document, str)]
    assert sorted(texts) == sorted(f"row {n}" for n in range(60))
    numbers = [int(text.split()[1]) for text in calibration if isinstance(text, str)]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_plain_text_gives_paragraphs_joined_to_documents(tmp_path: Path, suffix: str):
    paragraphs = [f"{number}: " + "数 letters and more " * 30 for number in range(40)]
    path = tmp_path / f"text{suffix}"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    calibration, held_out = both(path)
    found = sorted(calibration + held_out, key=lambda document: int(document.split(":")[0]))
    assert "".join(found).split("\n\n")[:-1] == paragraphs
    assert all(2000 <= len(document) < 2000 + len(paragraphs[-1]) + 2 for document in found[:-1])


LINES = "\n".join(f"{number}: a line of a log, 数 and more" for number in range(3000))


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.replace("\n", " "),
        LINES.replace("\n", "").replace(" ", ""),
        LINES.replace("\n", "\n \n"),
        f"A heading\n\n{LINES}\n\nAn end",
        f"{LINES}\n\n\n",
    ],
    ids=["lines", "words", "nothing to cut at", "lines of blanks", "a long paragraph", "blank lines at the end"],
)
def test_long_text_is_split_whatever_its_blank_lines(tmp_path: Path, text: str):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    calibration, held_out = both(path)
    assert len(calibration) > 3 * len(held_out) > 3
    assert max(map(len, calibration + held_out)) <= 2001
    seen = "".join(documents(path, "calibration") + documents(path, "held-out"))
    assert sorted("".join(seen.split())) == sorted("".join(text.split()))
    if "\n" in text.strip():
        assert all(part.strip() in text and f"\n{part.strip()}\n" in f"\n{text}\n" for part in calibration + held_out)


@given(st.lists(st.text("ab\n ", max_size=900), max_size=40))
@settings(deadline=None)
def test_paragraphs_that_are_not_very_long_are_never_cut(tmp_path_factory: pytest.TempPathFactory, parts: list[str]):
    text = "\n\n".join(["start", *parts, "end"])
    path = tmp_path_factory.mktemp("plain") / "text.txt"
    path.write_text(text)
    expected, joined = [], ""
    for paragraph in text.split("\n\n"):
        joined += paragraph + "\n\n"
        if len(joined) >= 2000:
            expected.append(joined)
            joined = ""
    expected += [joined] if joined.strip() else []
    calibration, held_out = both(path)
    assert sorted(calibration + held_out) == sorted(expected)


def test_a_short_text_is_one_document(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("One line.\nAnother.")
    assert [document for split in both(path) for document in split] == ["One line.\nAnother.\n\n"]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        pytest.param("[" * 100_000, id="nested too deeply"),
        "[]",
        '{"txt": "a"}',
        '{"text": 1}',
        '{"messages": []}',
        '{"messages": "hello"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 1}]}',
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:3: (expected|not valid JSON)"):
        documents(path, "calibration")


@pytest.mark.parametrize(
    "row",
    [r'{"text": "a\ud83d"}', r'{"messages": [{"role": "user", "content": "\ude00 b"}]}'],
)
def test_half_a_character_is_refused_with_its_line(tmp_path: Path, row: str):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "whole: \ud83d\ude00"}' + "\n" + row + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2: \\ud[8e][03][0d] is half of a surrogate pair"):
        documents(path, "calibration")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_bytes_that_are_no_text_are_refused_in_one_message(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b'{"text": "good"}\n' + "{'text': '设置'}\n".encode("gbk"))
    with pytest.raises(UserError, match=rf"{name}.*UTF-8"):
        documents(path, "calibration")


# Splitting


@given(st.lists(st.text(min_size=1), min_size=1, max_size=40))
@settings(deadline=None)
def test_splits_cover_everything_once_and_depend_on_the_text_alone(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
):
    folder = tmp_path_factory.mktemp("splits")
    rows = [{"text": text} for text in texts]
    calibration, held_out = both(write_jsonl(folder / "a.jsonl", rows))
    assert sorted(calibration + held_out) == sorted(texts)
    assert not set(calibration) & set(held_out)  # duplicates too stay on one side
    backwards = both(write_jsonl(folder / "b.jsonl", rows[::-1]))
    assert (calibration[::-1], held_out[::-1]) == backwards


def test_the_interpreters_documentation_is_split_by_module():
    calibration, held_out = both(None)
    assert (calibration, held_out) == both(None)
    assert not set(calibration) & set(held_out)
    assert len(calibration) > 5 * len(held_out) > 50
    assert python_docs.split_of("json.decoder") == python_docs.split_of("json.encoder") == python_docs.split_of("json")
    modules = [{text.split()[1].split(".")[0] for text in side if text.startswith("module ")} for side in both(None)]
    assert all(modules)
    assert not modules[0] & modules[1]


def test_what_has_text_in_the_interpreters_documentation_is_told_from_its_first_lines():
    titles = {*python_docs.titles("calibration"), *python_docs.titles("held-out")}
    modules = [python_docs.Title(name, path) for name, path in python_docs.module_files().items()]
    with_text = {title for title in modules if python_docs.document(title)}
    assert with_text == {title for title in titles if title.path}
    assert len(with_text) < len(modules)


def test_the_interpreters_documents_come_shuffled_as_if_they_had_all_been_made(monkeypatch: pytest.MonkeyPatch):
    made = []
    document = python_docs.document
    monkeypatch.setattr(python_docs, "document", lambda title: made.append(title) or document(title))
    first = next(shuffled(None, "calibration", seed=3))
    assert len(made) == 1
    order = python_docs.documents("calibration")
    random.Random(3).shuffle(order)
    assert first == order[0]


# Finding files


def test_a_file_is_looked_up_beside_the_recipe_then_in_the_working_directory(tmp_path: Path):
    recipe, here = tmp_path / "recipes", tmp_path / "here"
    for folder, names in ((recipe, ["both.txt"]), (here, ["both.txt", "only.jsonl"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("text")
    bases = [recipe, here]
    assert locate("both.txt", bases, "calibration.source") == recipe / "both.txt"
    assert locate("only.jsonl", bases, "calibration.source") == here / "only.jsonl"
    assert locate("../here/only.jsonl", bases, "calibration.source") == here / "only.jsonl"
    assert locate(str(here / "both.txt"), bases, "calibration.source") == here / "both.txt"
    assert locate(PYTHON_DOCS, bases, "calibration.source") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.txt", r"calibration\.source: no file 'absent\.txt' in .*recipes or in .*here.*python-docs"),
        ("folder", r"calibration\.source: no file 'folder'"),
        ("table.csv", r"calibration\.source: .*table\.csv: expected a \.jsonl, \.txt or \.md file"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, source: str, message: str):
    recipe, here = tmp_path / "recipes", tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "table.csv").touch()
    with pytest.raises(UserError, match=message):
        locate(source, [recipe, here], "calibration.source")


# Tokens


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", [{"text": f"Document {n} says {n * n}."} for n in range(100)])


def test_rows_are_the_documents_in_a_row(tokenizer: PreTrainedTokenizerFast, text_file: Path):
    rows = token_rows(Reader(tokenizer), text_file, "calibration", 6, 50, seed=0)
    assert rows.shape == (6, 50)
    written = tokenizer.decode(rows.flatten(), skip_special_tokens=False).split("<|endoftext|>")
    known = documents(text_file, "calibration")
    assert set(written[:-1]) <= set(known)
    assert any(text.startswith(written[-1]) for text in known)
    assert len(set(written)) == len(written)
    assert written != known[: len(written)]  # they are shuffled


def test_the_seed_decides_the_order(tokenizer: PreTrainedTokenizerFast, text_file: Path):
    one, same, other = (token_rows(Reader(tokenizer), text_file, "calibration", 4, 50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@given(samples=st.integers(1, 6), more=st.integers(1, 6))
@settings(deadline=None, max_examples=10)
def test_more_samples_only_add_rows(tokenizer: PreTrainedTokenizerFast, samples: int, more: int):
    few = token_rows(Reader(tokenizer), None, "calibration", samples, 16, seed=0)
    many = token_rows(Reader(tokenizer), None, "calibration", samples + more, 16, seed=0)
    assert torch.equal(many[:samples], few)


def test_little_text_gives_fewer_rows_and_too_little_an_error(tokenizer: PreTrainedTokenizerFast, text_file: Path):
    everything = sum(
        len(tokenizer(text)["input_ids"]) + 1 for text in documents(text_file, "calibration")
    )  # one end of text each
    rows = token_rows(Reader(tokenizer), text_file, "calibration", 1000, 64, seed=0)
    assert rows.shape == (everything // 64, 64)
    message = rf"text\.jsonl: the calibration split has {everything} tokens, not enough for one row"
    with pytest.raises(UserError, match=message):
        token_rows(Reader(tokenizer), text_file, "calibration", 1, everything + 1, seed=0)
    assert token_rows(Reader(tokenizer), text_file, "calibration", 1, everything, seed=0).shape == (1, everything)


def test_an_empty_file_is_too_little(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt: the calibration split has 0 tokens"):
        token_rows(Reader(tokenizer), tmp_path / "empty.txt", "calibration", 1, 8, seed=0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "[user] {}\n[assistant] {}\n"),
        (None, "user: {}\nassistant: {}"),
    ],
)
def test_messages_go_through_the_chat_template_if_there_is_one(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    expected: str,
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = expected.format(*(turn["content"] for turn in MESSAGES))
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    split = "calibration" if documents(path, "calibration") else "held-out"
    length = len(tokenizer(text)["input_ids"]) + 1
    row = token_rows(Reader(tokenizer), path, split, 1, length, seed=0)[0]
    assert tokenizer.decode(row) == text + "<|endoftext|>"


@given(samples=st.integers(1, 20), length=st.sampled_from([3, 512, 1000, BATCH_TOKENS, BATCH_TOKENS + 1]))
@settings(deadline=None)
def test_batches_are_all_rows_in_order_and_not_too_large(samples: int, length: int):
    rows = torch.arange(samples)[:, None].expand(samples, length)
    batches = batched(rows)
    assert torch.equal(torch.cat(batches), rows)
    assert all(batch.numel() <= BATCH_TOKENS or len(batch) == 1 for batch in batches)
    assert all(batch.numel() + length > BATCH_TOKENS for batch in batches[:-1])
