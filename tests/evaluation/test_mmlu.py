"""MMLU: the questions, prompts and categories are lm-eval's own, and every answer is on record."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from rich.console import Console

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation import EvaluationOptions, evaluate, mmlu
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from autoglm_compress.evaluation.mmlu_result import category_of_subject
from autoglm_compress.progress import Progress
from autoglm_compress.runtime import Runtime
from support.evaluating import hugging_face
from support.questions import QUESTIONS, write, write_quiz
from support.quiet import CPU, quiet


def stock_requests(subject: str, num_fewshot: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The prompts and continuations of lm-eval's own task, its data being swapped below it."""
    rows = [
        {"question": q, "choices": list(c), "answer": "ABCD".index(a), "subject": subject} for q, *c, a in QUESTIONS
    ]
    data = {"dev": Dataset.from_list(rows[:2]), "test": Dataset.from_list(rows[2:])}
    monkeypatch.setattr("datasets.load_dataset", lambda **_: data)
    files = mmlu.TASK_FILES
    config = yaml.safe_load((files / "_default_template_yaml").read_text())
    config |= yaml.safe_load((files / f"mmlu_{subject}.yaml").read_text())
    del config["include"]
    task = ConfigurableTask(config=config | {"num_fewshot": num_fewshot})
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_prompts_are_those_of_lm_eval(tmp_path: Path, num_fewshot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = "high_school_us_history"
    write(tmp_path / "dev" / f"{subject}_dev.csv", QUESTIONS[:2])
    write(tmp_path / "test" / f"{subject}_test.csv", QUESTIONS[2:])
    (task,) = mmlu.mmlu_group(tmp_path, num_fewshot).get_all_tasks()
    task.build_all_requests()
    prompts = [instance.args for instance in task.instances]
    assert prompts == stock_requests(subject, num_fewshot, monkeypatch)
    hub = {task.task_name: task for task in mmlu.mmlu_group(None, num_fewshot).get_all_tasks()}
    assert len(hub) == 57
    hub[f"mmlu::{subject}"].build_all_requests()
    assert [instance.args for instance in hub[f"mmlu::{subject}"].instances] == prompts


def test_descriptions_are_those_of_lm_eval() -> None:
    for path in mmlu.TASK_FILES.glob("mmlu_*.yaml"):
        stock = yaml.safe_load(path.read_text())
        assert stock["description"] == mmlu.description(stock["dataset_name"])


def test_limits_are_nested_and_fixed(quiz: Path) -> None:
    group = mmlu.mmlu_group(quiz, 0)
    few, more, all_ = (mmlu.chosen_questions(group, limit) for limit in (3, 6, None))
    for name in few:
        assert len(few[name]) == 3
        assert set(few[name]) < set(more[name]) < set(all_[name])
    assert all_["mmlu::anatomy"] == list(range(12))
    assert few == mmlu.chosen_questions(mmlu.mmlu_group(quiz, 2), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"two\nlines",a,b,c,d,A\nq,a,b,c,d\n', r"line 3: 5 fields, expected 6"),
        ("q,a,b,c,d,A\n\nq,a,b,c,d,E\n", r"line 3: the answer \(last field\) is 'E'"),
        ("q,a,b,c,d,1\n", r"line 1: the answer"),
        ("\n", "no questions"),
        ('q,a,b,c,d,A\n"open,a,b,c,d,A\n', "not CSV in UTF-8"),
    ],
)
def test_malformed_questions(quiz: Path, text: str, message: str) -> None:
    path = quiz / "test" / "anatomy_test.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        mmlu.mmlu_group(quiz, 0)
    assert str(path) in str(error.value)


def test_questions_not_in_utf8(quiz: Path) -> None:
    (quiz / "test" / "anatomy_test.csv").write_bytes("q,a,b,c,\xe9,A\n".encode("latin-1"))
    with pytest.raises(UserError, match="not CSV in UTF-8"):
        mmlu.mmlu_group(quiz, 0)


def test_missing_files(quiz: Path) -> None:
    with pytest.raises(UserError, match=r"2 examples, but num_fewshot is 3"):
        mmlu.mmlu_group(quiz, 3)
    (quiz / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match=r"no anatomy_dev.csv"):
        mmlu.mmlu_group(quiz, 2)
    write(quiz / "test" / "anatomy.csv", QUESTIONS)
    with pytest.raises(UserError, match="a second file of the subject anatomy"):
        mmlu.mmlu_group(quiz, 0)
    with pytest.raises(UserError, match="no such folder, or no CSV files"):
        mmlu.mmlu_group(quiz / "nowhere", 0)


def mmlu_of(folder: Path, quiz: Path, **options: Any) -> dict[str, Any]:
    """The result of MMLU with two examples."""
    chosen = EvaluationOptions.model_validate({"mmlu": {"num_fewshot": 2, **options}})
    settings = {"perplexity_rows": None, "mmlu_folder": quiz, "runtime": quiet()}
    return evaluate(Checkpoint(folder), ["mmlu"], chosen, **settings)["mmlu"]


def log_likelihoods(result: dict[str, Any]) -> torch.Tensor:
    """Of the four answers of all questions [questions, 4]."""
    subjects = result["subjects"].values()
    return torch.tensor([record["log_likelihoods"] for subject in subjects for record in subject["records"]])


def test_choices_are_those_of_hflm(family_model: Path, quiz: Path) -> None:
    group = mmlu.mmlu_group(quiz, 2)
    for task in group.get_all_tasks():
        task.build_all_requests()
    requests = [instance for task in group.get_all_tasks() for instance in task.instances]
    theirs = torch.tensor([value for value, _ in hugging_face(family_model).loglikelihood(requests, True)]).view(-1, 4)
    result = mmlu_of(family_model, quiz)
    torch.testing.assert_close(log_likelihoods(result), theirs, rtol=1e-5, atol=1e-4)
    records = [record for subject in result["subjects"].values() for record in subject["records"]]
    assert [record["choice"] for record in records] == ["ABCD"[choice] for choice in theirs.argmax(1)]
    keys = [question[-1] for question in QUESTIONS * 8]
    assert [record["right"] for record in records] == [
        record["choice"] == key for record, key in zip(records, keys, strict=True)
    ]


@pytest.mark.parametrize("token_budget", [1, 100_000])
def test_records_do_not_depend_on_the_batches(
    glm: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch, token_budget: int
) -> None:
    expected = mmlu_of(glm, quiz)
    monkeypatch.setattr(LayerwiseLM.__init__, "__kwdefaults__", {"token_budget": token_budget})
    found = mmlu_of(glm, quiz)
    torch.testing.assert_close(log_likelihoods(found), log_likelihoods(expected), rtol=1e-5, atol=1e-4)
    assert [subject["correct"] for subject in found["subjects"].values()] == [
        subject["correct"] for subject in expected["subjects"].values()
    ]


def test_a_record_is_known_by_its_question(glm: Path, quiz: Path) -> None:
    everything = mmlu_of(glm, quiz)["subjects"]["anatomy"]
    few = mmlu_of(glm, quiz, limit=4)["subjects"]["anatomy"]
    places = [int(record["id"].split("/")[1]) for record in few["records"]]
    assert places == mmlu.chosen_questions(mmlu.mmlu_group(quiz, 2), 4)["mmlu::anatomy"]
    assert [record["id"] for record in few["records"]] == [everything["records"][place]["id"] for place in places]
    assert len({record["id"] for record in everything["records"]}) == 12
    assert everything["correct"] == "".join(str(int(record["right"])) for record in everything["records"])
    rows = [(f"{n}. {q[0]}", *q[1:]) for n, q in enumerate(QUESTIONS * 4)]
    rows[3] = (*rows[3][:5], "D")  # another answer is another question
    write(quiz / "test" / "anatomy_test.csv", rows)
    changed = mmlu_of(glm, quiz)["subjects"]["anatomy"]
    differ = [one["id"] != other["id"] for one, other in zip(changed["records"], everything["records"], strict=True)]
    assert differ == [place == 3 for place in range(12)]
    assert changed["prompts"] == everything["prompts"]
    write(quiz / "dev" / "anatomy_dev.csv", QUESTIONS[1:])
    assert mmlu_of(glm, quiz)["subjects"]["anatomy"]["prompts"] != everything["prompts"]


def test_categories_are_those_of_lm_eval() -> None:
    found = category_of_subject()
    assert len(found) == 57
    assert set(found.values()) == {"stem", "humanities", "social sciences", "other"}
    for stock in mmlu.stock_tasks():
        assert stock["tag"] == f"mmlu_{found[stock['dataset_name']].replace(' ', '_')}_tasks"
    assert found["anatomy"] == "stem"
    assert found["moral_disputes"] == "humanities"


def test_categories_are_pooled(glm: Path, tmp_path: Path) -> None:
    quiz = write_quiz(tmp_path, "anatomy", "astronomy", "world_religions", "rivers")
    result = mmlu_of(glm, quiz, limit=7)
    assert list(result["categories"]) == ["humanities", "stem"]
    assert {name: part["category"] for name, part in result["subjects"].items()} == {
        "anatomy": "stem",
        "astronomy": "stem",
        "world_religions": "humanities",
        "rivers": None,
    }
    stem = result["categories"]["stem"]
    parts = [result["subjects"][name] for name in ("anatomy", "astronomy")]
    assert stem["questions"] == 14
    assert stem["accuracy"] == pytest.approx(sum(part["accuracy"] for part in parts) / 2)
    # Subjects of the same size: the variance of the mean is the mean of theirs, halved.
    assert stem["stderr"] == pytest.approx(math.sqrt(sum(part["stderr"] ** 2 for part in parts)) / 2)
    share = parts[0]["accuracy"]
    assert parts[0]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 6))


def test_one_question_has_no_standard_error(glm: Path, quiz: Path) -> None:
    result = mmlu_of(glm, quiz, limit=1)
    assert result["stderr"] is None
    assert result["categories"]["stem"]["stderr"] is None
    assert result["subjects"]["anatomy"]["stderr"] is None


def test_subjects(glm: Path, quiz: Path) -> None:
    assert list(mmlu_of(glm, quiz, subjects=["high_school_rivers"])["subjects"]) == ["high_school_rivers"]
    with pytest.raises(UserError, match=r"no subject 'anatomie' among the 2 of .* Did you mean anatomy"):
        mmlu_of(glm, quiz, subjects=["anatomie"])
    with pytest.raises(UserError, match=r"no subject 'astronomi' among the 57 of MMLU"):
        mmlu.mmlu_group(None, 0, ["astronomi"])


def test_questions_are_looked_at_before_anything_is_measured(glm: Path, quiz: Path) -> None:
    (quiz / "test" / "anatomy_test.csv").write_text("q,a,b,c,d,E")
    told = io.StringIO()
    with pytest.raises(UserError, match=r"anatomy_test\.csv, line 1"):
        evaluate(
            Checkpoint(glm),
            ["perplexity", "mmlu"],
            EvaluationOptions(),
            perplexity_rows=lambda: torch.zeros(1, 4, dtype=torch.long),
            mmlu_folder=quiz,
            runtime=Runtime(CPU, Progress(Console(file=told))),
        )
    assert told.getvalue() == ""
