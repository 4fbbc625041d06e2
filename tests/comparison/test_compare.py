"""`compare`: verdicts and exit codes, what it writes, and what it refuses."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from support.command_line import assert_says, refusal
from support.questions import results, save
from support.running import invoke

ROWS = [3.0, 3.2, 2.9, 3.1, 3.3, 3.0]
SAME = {"anatomy": "1101" * 100, "law": "1001" * 100}
WORSE = {"anatomy": "1001" * 100, "law": "1001" * 100}


def compare(folder: Path, base: dict[str, Any], new: dict[str, Any], *arguments: object) -> tuple[int, str]:
    """Exit code, and what was printed with runs of spaces as one."""
    files = save(folder / "base.json", base), save(folder / "new.json", new)
    result = invoke("compare", *files, *arguments)
    return result.exit_code, "\n".join(" ".join(line.split()) for line in result.output.splitlines())


def refused(folder: Path, base: Any, new: Any, *arguments: object) -> str:
    return refusal("compare", save(folder / "base.json", base), save(folder / "new.json", new), *arguments)


def test_a_drop_fails(tmp_path: Path):
    code, output = compare(tmp_path, results(SAME, ROWS), results(WORSE, [row + 0.01 for row in ROWS], shift=0.1))
    assert code == 1
    assert_says(
        output,
        "stem 75.0% 50.0% -25.0 -28.7 to -21.6",
        "humanities 50.0% 50.0% +0.0",
        "mmlu 62.5% 50.0% -12.5",
        "fail",
        "at best (95 % confidence), beyond the allowed -1; of 800 questions 100 lost, 0 won, McNemar p = 1.6e-30",
    )
    assert "perplexity 21.8" in output
    assert "anatomy" not in output


def test_a_model_that_did_not_get_worse_passes(tmp_path: Path):
    code, output = compare(tmp_path, results(WORSE), results(SAME, shift=0.1))
    assert code == 0
    assert "mmlu: pass: +10.70 points at worst (95 % confidence), within the allowed -1" in output


def test_the_same_log_likelihoods_pass_however_few(tmp_path: Path):
    few = {"rivers": "110"}
    code, output = compare(tmp_path, results(few), results(few), "--max-drop", 0)
    assert code == 0
    assert_says(output, "rivers 66.7% 66.7%", "mmlu: pass: not one log-likelihood changed; of 3 questions")
    code, output = compare(tmp_path, results(few), results(few, shift=1e-5), "--max-drop", 0)
    assert code == 3
    assert "more questions like these would not decide it" in output


def test_too_few_questions_are_undecided(tmp_path: Path):
    few = {"rivers": "1" * 130}
    code, output = compare(tmp_path, results(few), results(few, shift=0.1))
    assert code == 3
    assert "mmlu: undecided: between -2.04 and +2.04 points (each with 95 % confidence), -1 is allowed" in output
    assert "about 268 questions would decide it" in output
    assert compare(tmp_path, results(few), results(few, shift=0.1), "--max-drop", 3)[0] == 0


def test_confidence_widens_the_bounds(tmp_path: Path):
    few = {"rivers": "1" * 280}
    assert compare(tmp_path, results(few), results(few, shift=0.1))[0] == 0
    code, output = compare(tmp_path, results(few), results(few, shift=0.1), "--confidence", 0.99)
    assert code == 3
    assert "each of which holds with 99 % confidence" in output


@pytest.mark.parametrize(("limit", "code", "verdict"), [(2, 0, "pass"), (0.5, 1, "fail"), (1.005, 3, "undecided")])
def test_perplexity_is_gated_by_rows(tmp_path: Path, limit: float, code: int, verdict: str):
    after = [row + math.log(1.01) + (-1) ** place * 1e-4 for place, row in enumerate(ROWS)]
    arguments = "--max-perplexity-increase", limit
    found, output = compare(tmp_path, results(rows=ROWS), results(rows=after), *arguments)
    assert found == code
    assert_says(output, "perplexity 21.", "+1.0%", f"perplexity: {verdict}: ", "6 rows")
    found, output = compare(tmp_path, results(SAME, ROWS), results(SAME, after), *arguments)
    assert found == code
    assert "mmlu: pass" in output


def test_rows_that_tell_nothing(tmp_path: Path):
    arguments = "--max-perplexity-increase", 1
    code, output = compare(tmp_path, results(rows=[0.0, 499.0]), results(rows=[499.0, 0.0]), *arguments)
    assert code == 3
    assert "perplexity: undecided" in output


def test_what_machines_read(tmp_path: Path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "junit")}
    arguments = [part for name, file in files.items() for part in (f"--{name}", file)]
    new = results(WORSE, [row + 0.5 for row in ROWS], shift=0.1)
    new["tasks"]["arc_easy"] = {"settings": {}, "result": {"acc": 0.5}}
    code, _ = compare(tmp_path, results(SAME, ROWS), new, "--max-perplexity-increase", 1, *arguments)
    assert code == 1

    data = json.loads(files["json"].read_text())
    assert (data["verdict"], data["limits"]["confidence"]) == ("fail", 0.95)
    assert data["not_compared"] == ["arc_easy"]
    measures = {measure["name"]: measure for measure in data["measures"]}
    assert list(measures) == ["anatomy", "law", "humanities", "stem", "mmlu", "perplexity"]
    assert measures["anatomy"]["level"] == "subject"
    total = measures["mmlu"]
    assert (total["base"], total["new"], total["change"], total["count"]) == (62.5, 50, -12.5, 800)
    assert (total["lost"], total["won"]) == (100, 0)
    assert total["low"] < -12.5 < total["high"] < -1
    assert total["gate"] == {"limit": 1.0, "verdict": "fail", "needed": None}
    assert measures["perplexity"]["change"] == pytest.approx(100 * math.expm1(0.5))
    assert measures["law"]["gate"] is None

    text = files["markdown"].read_text()
    assert_says(text, "### fail: ", "| mmlu | 62.5% | 50.0% | -12.5 |", "- mmlu: fail: ", "not compared")

    suite = ElementTree.parse(files["junit"]).getroot().find("testsuite")
    assert suite.attrib.items() >= {"tests": "2", "failures": "2", "skipped": "0", "errors": "0"}.items()
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["mmlu", "perplexity"]
    assert "100 lost" in cases[0].find("failure").get("message")


def test_undecided_is_skipped_in_junit(tmp_path: Path):
    few = {"a|b": "1" * 30}
    files = "--junit", tmp_path / "out.xml", "--markdown", tmp_path / "out.md"
    assert compare(tmp_path, results(few), results(few, shift=0.1), *files)[0] == 3
    suite = ElementTree.parse(tmp_path / "out.xml").getroot().find("testsuite")
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert suite.find("testcase/skipped") is not None
    assert "| a\\|b |" in (tmp_path / "out.md").read_text()


def edit(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Good results, with something wrong about them."""
    data = copy.deepcopy(results(SAME, ROWS))
    change(data)
    return data


def mmlu(data: dict[str, Any]) -> dict[str, Any]:
    return data["tasks"]["mmlu"]["result"]


def records(data: dict[str, Any]) -> list[dict[str, Any]]:
    return mmlu(data)["subjects"]["anatomy"]["records"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema_version=2), ["schema_version: given 2", "reads 1", "Evaluate again"]),
        (lambda data: data.pop("schema_version"), ["schema_version: missing", "expected 1"]),
        (lambda data: data.update(tasks=[]), ["tasks: expected an object"]),
        (lambda data: data["tasks"].update(mmlu={}), ["tasks.mmlu.result: missing"]),
        (lambda data: data["tasks"].pop("mmlu"), ["no task mmlu", "same --tasks"]),
        (lambda data: data["tasks"].pop("perplexity"), ["no task perplexity", "same --tasks"]),
        (lambda data: mmlu(data).update(num_fewshot=0), ["num_fewshot is 0 and 5", "same --num-fewshot"]),
        (lambda data: mmlu(data).update(subjects={}), ["tasks.mmlu.result.subjects"]),
        (lambda data: mmlu(data)["subjects"].pop("law"), ["400 only in the base", "law/0/h", "--subjects"]),
        (lambda data: records(data).pop(), ["not the same questions: 1 only in the base", "anatomy/399/h"]),
        (lambda data: records(data)[0].update(id="anatomy/0/x"), ["1 only in the base, 1 only in the new"]),
        (lambda data: records(data)[1].update(id="anatomy/0/h"), ["anatomy/0/h is there 2 times"]),
        (lambda data: records(data)[2].pop("right"), ["subjects.anatomy.records.2.right", "required"]),
        (lambda data: records(data)[2].update(right="yes"), ["records.2.right", "boolean"]),
        (lambda data: records(data)[2].update(choice="E"), ["records.2.choice", "'A', 'B', 'C' or 'D'"]),
        (lambda data: records(data)[2]["log_likelihoods"].pop(), ["records.2.log_likelihoods", "at least 4"]),
        (lambda data: records(data)[2].update(log_likelihoods=[math.nan] * 4), ["log_likelihoods.0", "finite"]),
        (lambda data: mmlu(data)["subjects"]["law"].update(prompts="others"), ["law: the same questions in other"]),
        (lambda data: data["tasks"]["perplexity"]["result"].update(text="other"), ["not of the same tokens"]),
        (
            lambda data: data["tasks"]["perplexity"]["result"].update(rows=[3.0]),
            ["perplexity.result.rows", "at least 2"],
        ),
    ],
)
def test_results_that_cannot_be_compared(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]):
    assert_says(refused(tmp_path, results(SAME, ROWS), edit(change)), tmp_path / "new.json", *words)


def test_files_that_are_none(tmp_path: Path):
    good = save(tmp_path / "good.json", results(SAME))
    assert_says(refusal("compare", good, tmp_path / "none.json"), tmp_path / "none.json", "No such file")
    assert_says(refusal("compare", tmp_path, good), tmp_path, "cannot be read: Is a directory")
    (tmp_path / "bad.json").write_text('{"schema_version": 1,')
    assert_says(refusal("compare", good, tmp_path / "bad.json"), "bad.json", "not valid JSON", "Evaluate again")
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": 1}')
    assert_says(refusal("compare", good, tmp_path / "latin.json"), "latin.json", "not valid JSON")
    assert_says(refused(tmp_path, [1], results(SAME)), "base.json: expected a JSON object, found list")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-drop", "-1"], ["--max-drop: given -1", "0 to 100"]),
        (["--max-drop", "nan"], ["--max-drop: given nan"]),
        (["--max-perplexity-increase", "inf"], ["--max-perplexity-increase: given inf"]),
        (["--confidence", "0.5"], ["--confidence: given 0.5", "between 0.5 and 1"]),
        (["--confidence", "95"], ["--confidence: given 95", "such as 0.95"]),
        (["--json", "no/such/folder.json"], ["no/such/folder.json: cannot write there"]),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, arguments: list[str], words: list[str]):
    assert_says(refused(tmp_path, results(SAME, ROWS), results(SAME, ROWS), *arguments), *words)


def test_gates_without_a_task(tmp_path: Path):
    rows, questions = results(rows=ROWS), results(SAME)
    assert_says(refused(tmp_path, rows, rows), "nothing would be gated", "--max-perplexity-increase")
    assert_says(refused(tmp_path, rows, rows, "--max-drop", 1), "--max-drop: no task mmlu")
    assert_says(
        refused(tmp_path, questions, questions, "--max-perplexity-increase", 1),
        "--max-perplexity-increase: no task perplexity",
    )
