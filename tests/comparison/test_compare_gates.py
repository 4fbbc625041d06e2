"""`compare` on more than MMLU: predictions held against the source's, and the metrics of other tasks of lm-eval."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from support.command_line import assert_says, refusal
from support.questions import results, save
from support.running import invoke

SAME = {"anatomy": "1101" * 100}
NEAR = [0.04, 0.05, 0.06, 0.05, 0.04, 0.06]
RIGHT, WRONG = "1" * 200, "1" * 180 + "0" * 20


def compare(folder: Path, base: Any, new: Any, *arguments: object) -> tuple[int, str]:
    """Exit code, and what was printed with runs of spaces as one."""
    files = save(folder / "base.json", base), save(folder / "new.json", new)
    result = invoke("compare", *files, *arguments)
    return result.exit_code, " ".join(result.output.split())


def refused(folder: Path, base: Any, new: Any, *arguments: object) -> str:
    return refusal("compare", save(folder / "base.json", base), save(folder / "new.json", new), *arguments)


@pytest.mark.parametrize(
    ("option", "limits"),
    [("--max-divergence", (0.07, 0.05, 0.03)), ("--min-agreement", (99.0, 99.5, 99.7))],
)
def test_predictions_are_gated_by_rows(tmp_path: Path, option: str, limits: tuple[float, ...]):
    name = option.rpartition("-")[2]
    for limit, code, verdict in zip(limits, (0, 3, 1), ("pass", "undecided", "fail"), strict=True):
        found, output = compare(tmp_path, results(), results(divergences=NEAR), option, limit)
        assert found == code
        assert_says(output, f"{name}: {verdict}: ", f"{limit:g}", "6 rows", "divergence 0.0500 0.0426 to 0.0574")
        assert_says(output, "agreement 99.5% 99.4% to 99.6%", "of the new model's value")


def test_the_same_predictions_pass(tmp_path: Path):
    arguments = ("--max-divergence", 0, "--min-agreement", 100)
    assert compare(tmp_path, results(), results(divergences=[0.0] * 4), *arguments)[0] == 0
    assert compare(tmp_path, results(), results(divergences=[0.0] * 3 + [0.1]), *arguments)[0] == 3


def test_the_base_shows_where_it_was_held_against_the_same(tmp_path: Path):
    base, new = results(SAME, divergences=[value / 5 for value in NEAR]), results(SAME, divergences=NEAR)
    _, output = compare(tmp_path, base, new)
    assert_says(output, "divergence 0.0100 0.0500 +0.0400", "agreement 99.9% 99.5% -0.4")
    base["tasks"]["agreement"]["result"]["against"] = "another"
    assert "divergence 0.0500 0.0426" in compare(tmp_path, base, new)[1]


def test_one_number_is_compared_as_it_is(tmp_path: Path):
    new = results(divergences=NEAR)
    del new["tasks"]["agreement"]["result"]["rows"]
    code, output = compare(tmp_path, results(), new, "--max-divergence", 0.05, "--min-agreement", 99.6)
    assert code == 1
    assert_says(output, "divergence: pass: 0.05 nats at worst (one number, nothing is known of chance), within")
    assert_says(
        output, "agreement: fail: 99.5 % at best (one number, nothing is known of chance), beyond the allowed 99.6"
    )


@pytest.mark.parametrize(("limit", "code", "verdict"), [(0.15, 0, "pass"), (0.11, 3, "undecided"), (0.02, 1, "fail")])
@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_other_metrics_are_gated_by_documents(tmp_path: Path, metric: str, limit: float, code: int, verdict: str):
    new = results(SAME, acc=WRONG)
    found, output = compare(tmp_path, results(SAME, acc=RIGHT), new, "--max-loss", f"arc_easy:{metric}={limit}")
    assert found == code
    assert_says(output, "arc_easy:acc 1.0000 0.9000 -0.1000", "arc_easy:perplexity 1.0000 1.1000 +0.1000")
    assert_says(output, f"arc_easy:{metric}: {verdict}: ", "200 documents")
    assert ("20 lost, 0 won" in output) == (metric == "acc")
    assert compare(tmp_path, new, results(SAME, acc=RIGHT), "--max-loss", f"arc_easy:{metric}=0")[0] == 0


def test_metrics_without_documents(tmp_path: Path):
    base, new = (results(acc=marks) for marks in (RIGHT, WRONG))
    for data in (base, new):
        del data["tasks"]["arc_easy"]["result"]["records"]["values"]["perplexity"]
    code, output = compare(tmp_path, base, new, "--max-loss", "arc_easy:perplexity=0.05")
    assert code == 1
    assert "arc_easy:perplexity: fail: +0.1000 at best (one number, nothing is known of chance), beyond" in output
    assert compare(tmp_path, base, new, "--max-loss", "arc_easy:perplexity=0.2")[0] == 0


def test_the_same_answers_pass_however_few(tmp_path: Path):
    gate = ("--max-loss", "arc_easy:acc=0")
    code, output = compare(tmp_path, results(acc="10"), results(acc="10"), *gate)
    assert code == 0
    assert "arc_easy:acc: pass: not one log-likelihood changed; of 2 documents" in output
    other = results(acc="10")
    other["tasks"]["arc_easy"]["result"]["records"]["responses"] = "others"
    assert compare(tmp_path, results(acc="10"), other, *gate)[0] == 3


def test_every_gate_is_in_what_machines_read(tmp_path: Path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "junit")}
    written = [part for name, file in files.items() for part in (f"--{name}", file)]
    base = results(SAME, [3.0, 3.1], divergences=NEAR, acc=RIGHT)
    new = results(SAME, [3.0, 3.1], divergences=NEAR, acc=WRONG)
    limits = ("--max-perplexity-increase", 1, "--max-divergence", 0.07, "--min-agreement", 99)
    code, _ = compare(tmp_path, base, new, *limits, "--max-loss", "arc_easy:acc=0.01", *written)
    assert code == 1
    data = json.loads(files["json"].read_text())
    gates = {measure["name"]: measure["gate"] for measure in data["measures"] if measure["gate"]}
    assert {name: gate["verdict"] for name, gate in gates.items()} == {
        "mmlu": "pass",
        "perplexity": "pass",
        "divergence": "pass",
        "agreement": "pass",
        "arc_easy:acc": "fail",
    }
    assert gates["arc_easy:acc"]["limit"] == data["limits"]["max_loss"]["arc_easy:acc"] == 0.01
    units = {measure["name"]: measure["unit"] for measure in data["measures"]}
    assert (units["divergence"], units["arc_easy:acc"]) == ("nats", "own")
    assert_says(files["markdown"].read_text(), "| divergence | 0.0500 | 0.0500 |", "- arc_easy:acc: fail: ")
    suite = ElementTree.parse(files["junit"]).getroot().find("testsuite")
    assert [case.get("name") for case in suite.findall("testcase")] == list(gates)
    assert suite.get("failures") == "1"


def edit(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Good results, with something wrong about their tasks."""
    data = copy.deepcopy(results(SAME, divergences=NEAR, acc=RIGHT))
    change(data["tasks"])
    return data


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda tasks: tasks.pop("agreement"), ["--max-divergence", "1"], ["--max-divergence: ", "--against SOURCE"]),
        (lambda tasks: tasks.pop("agreement"), ["--min-agreement", "9"], ["--min-agreement: ", "--against SOURCE"]),
        (
            lambda tasks: tasks.pop("arc_easy"),
            ["--max-loss", "arc_easy:acc=0"],
            ["no task arc_easy in", "new.json", "--tasks arc_easy"],
        ),
        (lambda tasks: None, ["--max-loss", "arc_easy:ac=0"], ["no metric ac", "Did you mean arc_easy:acc?"]),
        (lambda tasks: None, ["--max-loss", "arc_easy=0"], ["given 'arc_easy=0'", "TASK:METRIC=AMOUNT"]),
        (lambda tasks: None, ["--max-loss", "arc_easy:acc=x"], ["given 'arc_easy:acc=x'"]),
        (lambda tasks: None, ["--max-loss", "arc_easy:acc=-1"], ["--max-loss arc_easy:acc: given -1"]),
        (lambda tasks: None, ["--max-loss", "a:b=1", "--max-loss", "a:b=2"], ["a:b is given twice"]),
        (lambda tasks: None, ["--max-divergence", "-1"], ["--max-divergence: given -1", "nats from 0"]),
        (lambda tasks: None, ["--min-agreement", "101"], ["--min-agreement: given 101", "percent from 0 to 100"]),
        (
            lambda tasks: tasks["arc_easy"]["result"]["records"].update(documents="others"),
            [],
            ["arc_easy: not the same documents"],
        ),
        (
            lambda tasks: tasks["arc_easy"]["result"]["records"].pop("higher_is_better"),
            ["--max-loss", "arc_easy:acc=0"],
            ["does not say whether more of it is better", "Evaluate again"],
        ),
        (
            lambda tasks: tasks["agreement"]["result"]["rows"]["top1"].pop(),
            [],
            ["tasks.agreement.result", "not of the same length"],
        ),
        (lambda tasks: tasks["agreement"]["result"].update(divergence="low"), [], ["agreement.result.divergence"]),
        (lambda tasks: tasks["arc_easy"]["result"].update(acc="high"), [], ["arc_easy.result.values.acc"]),
    ],
)
def test_gates_that_cannot_be(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], arguments: list[str], words: list[str]
):
    assert_says(refused(tmp_path, edit(lambda tasks: None), edit(change), *arguments), *words)
