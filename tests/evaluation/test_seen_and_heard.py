"""Questions, answers and perplexity of models that see and hear are those of plain transformers, whole in memory."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.answers import exchanges
from autoglm_compress.checkpoint.processor import load_processor
from autoglm_compress.evaluation import generate
from support.command_line import assert_says, plan, refusal
from support.media import PROCESSORS, draw, record, row, save_with_processor, write_media_quiz, write_rows
from support.multimodal import load, logits, text_row
from support.running import invoke, run, write_recipe

torch.set_num_threads(1)
NEW_TOKENS = 4
INT4: dict[str, Any] = {"stage": "quantize", "name": "int4", "bits": 4, "group_size": 32, "method": "round_to_nearest"}


@pytest.fixture(scope="module")
def omni(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_processor("qwen2_5omnithinker", tmp_path_factory.mktemp("omni"), tokenizer)


class Plain:
    """A checkpoint in plain transformers, with its processor."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.processor = load(checkpoint, "auto"), load_processor(checkpoint)
        logits(self.model, text_row())  # unpacks integers, in the dtype that they were packed from
        torch.nn.Module.float(self.model)  # its own refuses, since it takes the integers to be packed still

    def inputs(self, messages: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
        """What the model takes for messages after which it answers."""
        whole = json.loads(json.dumps(messages))
        for part in (part for turn in whole if isinstance(turn["content"], list) for part in turn["content"]):
            part |= {"path": str(folder / part["path"])} if "path" in part else {}
        for turn in whole:
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        found = self.processor.apply_chat_template(
            whole, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def log_likelihoods(self, inputs: dict[str, torch.Tensor], answer: str) -> torch.Tensor:
        """Of each token of an answer, in nats."""
        tokens = torch.tensor([self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]])
        inputs = dict(inputs)
        length = inputs["input_ids"].shape[1]
        for name, more in (("input_ids", tokens), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                more = more if torch.is_tensor(more) else torch.full_like(tokens, more)
                inputs[name] = torch.cat([inputs[name], more], dim=1)
        found = logits(self.model, inputs)[0, length - 1 : -1].log_softmax(-1)
        return found.gather(1, tokens.T)[:, 0]

    def answer(self, inputs: dict[str, torch.Tensor]) -> str:
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = None
        [made] = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        answer = made[inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def asked(quiz: Path, subject: str = "shapes") -> Iterator[list[dict[str, Any]]]:
    """The messages of each question after one example, with files relative to the quiz."""

    def turn(split: str, fields: list[str], opening: str) -> dict[str, Any]:
        question, *choices, _, image, sound = fields
        lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
        files = [("image", image)] * bool(image) + [("audio", sound)] * bool(sound)
        return {
            "role": "user",
            "content": [
                *([{"type": "text", "text": opening}] if opening else []),
                *({"type": kind, "path": f"{split}/{name}"} for kind, name in files),
                {"type": "text", "text": f"{question}{lines}\nAnswer:"},
            ],
        }

    read = {}
    for split in ("dev", "test"):
        with (quiz / split / f"{subject}_{split}.csv").open(newline="") as stream:
            read[split] = list(csv.reader(stream))[1:]
    example = turn(
        "dev", read["dev"][0], f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    )
    for fields in read["test"]:
        yield [example, {"role": "assistant", "content": read["dev"][0][5]}, turn("test", fields, "")]


def check_letters(result: dict[str, Any], checkpoint: Path, quiz: Path) -> None:
    plain = Plain(checkpoint)
    records = result["subjects"]["shapes"]["records"]
    assert len(records) == 5
    for found, messages in zip(records, asked(quiz), strict=True):
        inputs = plain.inputs(messages, quiz)
        expected = torch.stack([plain.log_likelihoods(inputs, letter)[0] for letter in "ABCD"])
        torch.testing.assert_close(torch.tensor(found["log_likelihoods"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_letters_are_scored_as_by_plain_transformers(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = save_with_processor(name, tmp_path / "model", tokenizer)
    quiz = write_media_quiz(tmp_path / "quiz", sounds="omni" in name)
    output = tmp_path / "out.json"
    options = ("--tasks", "mmlu", "--mmlu", quiz, "--num-fewshot", 1, "--device", "cpu")
    result = invoke("evaluate", model, "--output", output, *options)
    assert result.exit_code == 0, result.output
    check_letters(json.loads(output.read_text())["tasks"]["mmlu"]["result"], model, quiz)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with images and sounds."""
    return write_rows(tmp_path_factory.mktemp("rows"), 40, sounds=True)


@pytest.fixture(scope="module")
def rows(omni: Path, chats: Path) -> Path:
    """Rows with images, sounds and text alone; the model gives the right answer to every second one."""
    plain, file = Plain(omni), chats.with_name("asked.jsonl")
    read = [*map(json.loads, chats.read_text().splitlines()[:10]), row("What is it?"), row("And this?")]
    for number, each in enumerate(read):
        if number % 2 == 0:
            each["messages"][-1]["content"] = plain.answer(plain.inputs(each["messages"][:-1], file.parent)) or "none"
    file.write_text("".join(json.dumps(each) + "\n" for each in read))
    return file


@pytest.fixture(scope="module")
def output(omni: Path, chats: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that quantizes the model, and measures all that it sees and hears before and after."""
    folder = tmp_path_factory.mktemp("run")
    evaluation = {
        "mmlu": {"data": str(write_media_quiz(folder / "quiz", sounds=True)), "num_fewshot": 1},
        "perplexity": {"source": str(chats), "answers": True},
        "generate": {"data": str(rows), "max_new_tokens": NEW_TOKENS},
    }
    stages = [INT4 | {"max_divergence": 1e9}, {"stage": "evaluate", "tasks": ["mmlu", "perplexity", "generate"]}]
    run(write_recipe(folder, omni, stages, evaluation=evaluation))
    return folder / "out"


def results_of(output: Path, name: str) -> dict[str, Any]:
    tasks = json.loads((output / "evaluations" / f"{name}.json").read_text())["tasks"]
    return {task: entry["result"] for task, entry in tasks.items()}


@pytest.mark.parametrize("name", ["00-source", "01-int4"])
def test_a_run_measures_what_plain_transformers_does(
    name: str, omni: Path, chats: Path, rows: Path, output: Path
) -> None:
    checkpoint = omni if name == "00-source" else output / name
    found, plain = results_of(output, name), Plain(checkpoint)
    check_letters(found["mmlu"], checkpoint, output.parent / "quiz")

    held_out = list(exchanges(chats, "held-out"))
    assert {kind for each in held_out for kind in each.prompt.media} == {"image", "audio"}
    nats = sorted(
        -float(plain.log_likelihoods(plain.inputs(each.prompt.messages, chats.parent), each.answer).mean())
        for each in held_out
    )
    torch.testing.assert_close(sorted(found["perplexity"]["rows"]), nats, rtol=1e-4, atol=1e-4)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)

    answers = found["generate"]["records"]["answers"]
    expected = [plain.answer(plain.inputs(each.prompt.messages, rows.parent)) for each in exchanges(rows)]
    assert [each["answer"] for each in answers] == expected
    assert [each["right"] for each in answers] == [each["answer"] == each["expected"] for each in answers]
    assert found["generate"]["exact_match"] == sum(each["right"] for each in answers) / len(answers)


def test_half_of_the_answers_are_right(output: Path) -> None:
    assert results_of(output, "00-source")["generate"]["exact_match"] >= 0.4


def test_answers_are_compared_in_pairs(output: Path) -> None:
    files = [output / "evaluations" / f"{name}.json" for name in ("00-source", "01-int4")]
    marks = [
        results_of(output, name)["generate"]["records"]["values"]["exact_match"] for name in ("00-source", "01-int4")
    ]
    lost = sum(old > new for old, new in zip(*marks, strict=True))
    result = invoke("compare", *files, "--max-drop", 100, "--max-loss", "generate:exact_match=1")
    assert result.exit_code == 0, result.output
    assert_says(" ".join(result.output.split()), "generate:exact_match: pass", f"of 12 documents {lost} lost")


def test_the_page_shows_answers(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert_says(page, "Generated answers", "✓", "✗", "What is number 0?", "generate exact_match")


def test_the_plan_says_the_memory_of_the_whole_model(omni: Path, rows: Path, tmp_path: Path) -> None:
    peaks = []
    for tasks in (["perplexity"], ["perplexity", "generate"]):
        stages = [{"stage": "evaluate", "tasks": tasks}]
        recipe = write_recipe(tmp_path, omni, stages, evaluation={"generate": {"data": str(rows)}})
        peaks.append(plan(recipe)["checkpoints"][-1]["peak_memory_bytes_estimate"])
    assert peaks[0] < peaks[1]


def test_a_stopped_generation_goes_on(
    omni: Path, rows: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tasks", "generate", "--generate", rows, "--max-new-tokens", NEW_TOKENS, "--limit", 6)
    command = ("evaluate", omni, "--output", tmp_path / "out.json", "--device", "cpu", *options)
    answer, asked = generate._answer, []

    def counted(*arguments: Any) -> str:
        asked.append(arguments)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(generate, "_answer", counted)
    assert invoke(*command).exit_code == 130
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert_says(result.output, "going on where an earlier evaluation stopped", "6 answers")
    assert len(asked) == 4 + 3
    found = json.loads((tmp_path / "out.json").read_text())["tasks"]["generate"]["result"]["records"]["answers"]
    known = {each["where"]: each for each in results_of(output, "00-source")["generate"]["records"]["answers"]}
    assert len(found) == 6
    assert found == [known[each["where"]] for each in found]


def test_case_and_space_can_be_ignored(make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(2 * (json.dumps(row("Where?", answer="Tap(5, 7)")) + "\n"))
    monkeypatch.setattr(generate, "_answer", lambda *_: "tap(5,7)")
    outputs = [tmp_path / f"{name}.json" for name in ("exact", "case", "both")]
    ignored: list[tuple[str, ...]] = [(), ("--ignore", "case"), ("--ignore", "case,space")]
    shares = []
    for output, ignore in zip(outputs, ignored, strict=True):
        options = ("--tasks", "generate", "--generate", file, "--device", "cpu", *ignore)
        result = invoke("evaluate", make_checkpoint("glm"), "--output", output, *options)
        assert result.exit_code == 0, result.output
        shares.append(json.loads(output.read_text())["tasks"]["generate"]["result"]["exact_match"])
    assert shares == [0, 0, 1]
    refused = refusal("compare", outputs[0], outputs[2], "--max-loss", "generate:exact_match=1")
    assert_says(refused, "generate: not the same", "--ignore")


IMAGE = {"type": "image", "path": "broken.png"}


def bad_files(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    draw(folder.parent / "outside.png", 0)
    draw(folder / "fine.png", 0)
    record(folder / "fine.wav", 0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row("?", {"type": "image", "path": "gone.png"}), ("rows.jsonl:1", "gone.png", "no file")),
        (row("?", IMAGE), ("rows.jsonl:1", "broken.png", "cannot read")),
        (row("?", answer=" "), ("rows.jsonl:1", "no answer", "last message")),
        ({"messages": [{"role": "user", "content": "?"}]}, ("rows.jsonl:1", "no answer", "last message")),
        ({"text": "Some text."}, ("rows.jsonl:1", "text without an answer")),
    ],
)
def test_bad_rows_are_said_before_work_starts(
    bad: dict[str, Any], words: tuple[str, ...], omni: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    bad_files(folder)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (bad, row("?"))))
    stages = [{"stage": "evaluate", "tasks": ["generate"]}]
    recipe = write_recipe(tmp_path, omni, stages, evaluation={"generate": {"data": str(file)}})
    options = ("--device", "cpu", "--tasks", "generate", "--generate", file)
    for command in (("evaluate", omni, "--output", tmp_path / "out.json", *options), ("plan", recipe)):
        assert_says(refusal(*command), *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q,a,b,c,d,A,gone.png", ("shapes_test.csv, line 3", "gone.png", "no file")),
        ("q,a,b,c,d,A,broken.png", ("shapes_test.csv, line 3", "broken.png", "cannot read")),
        ("q,a,b,c,d,A,../../outside.png", ("shapes_test.csv, line 3", "outside.png", "not within")),
        ("q,a,b,c,d,E,fine.png", ("shapes_test.csv, line 3", "column answer", "'E'")),
        ("q,a,b,c,d,A", ("shapes_test.csv, line 3", "6 fields, expected 7", "image")),
    ],
)
def test_bad_questions_are_said_before_work_starts(
    line: str, words: tuple[str, ...], omni: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quiz" / "test"
    folder.mkdir(parents=True)
    bad_files(folder)
    draw(tmp_path / "outside.png", 0)
    (folder / "shapes_test.csv").write_text(f"question,A,B,C,D,answer,image\nq,a,b,c,d,A,fine.png\n{line}\n")
    mmlu = {"data": str(tmp_path / "quiz"), "num_fewshot": 0}
    recipe = write_recipe(tmp_path, omni, [{"stage": "evaluate", "tasks": ["mmlu"]}], evaluation={"mmlu": mmlu})
    options = ("--tasks", "mmlu", "--mmlu", tmp_path / "quiz", "--num-fewshot", 0, "--device", "cpu")
    for command in (("evaluate", omni, "--output", tmp_path / "out.json", *options), ("plan", recipe)):
        assert_says(refusal(*command), *words)


def test_a_model_without_eyes_refuses_images(make_checkpoint: Any, tmp_path: Path) -> None:
    quiz = write_media_quiz(tmp_path / "quiz")
    options = ("--output", tmp_path / "out.json", "--device", "cpu", "--tasks")
    model = make_checkpoint("glm")
    refused = refusal("evaluate", model, *options, "mmlu", "--mmlu", quiz, "--num-fewshot", 1)
    assert_says(refused, "shapes_dev.csv, line 2", "image", "reads text alone")
    rows = write_rows(tmp_path, 3)
    assert_says(refusal("evaluate", model, *options, "generate", "--generate", rows), "rows.jsonl:1", "image", "reads")


def test_what_options_need(omni: Path, rows: Path, tmp_path: Path) -> None:
    command = ("evaluate", omni, "--output", tmp_path / "out.json", "--device", "cpu", "--tasks")
    assert_says(refusal(*command, "generate"), "--generate FILE")
    assert_says(refusal(*command, "perplexity", "--generate", rows), "add it to --tasks")
    assert_says(refusal(*command, "perplexity", "--answers"), "python-docs", ".jsonl", "--text")
    assert_says(refusal(*command, "perplexity", "--text", rows), "--answers", "python-docs")
    recipe = write_recipe(tmp_path, omni, [{"stage": "evaluate", "tasks": ["generate"]}])
    assert_says(refusal("plan", recipe), "evaluation.generate.data", "line")
