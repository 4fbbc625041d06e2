"""`report`: one page of a run, or of several, that needs nothing else and shows what is there."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.report import page as page_module
from support.command_line import assert_says, refusal
from support.pages import Page, read_page
from support.running import invoke, run, write_recipe

torch.set_num_threads(1)
STAGES = [
    {"stage": "depth", "layers": [0, 1, 3]},
    {"stage": "heads", "num_attention_heads": 6, "method": "magnitude"},
    {"stage": "refit", "logit_passes": 0},
    {"stage": "evaluate", "tasks": ["perplexity"]},
    {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32, "max_divergence": 9},
    {"stage": "quantize", "name": "mixed", "from": "refit", "bits": "auto", "budget": {"average_bits": 6},
     "group_size": 32, "max_divergence": 9},
]  # fmt: skip
CHECKPOINTS = ["01-depth", "02-heads", "03-refit", "05-int8", "06-mixed"]
EVIL = "<script>alert('1')</script>\"&$x_$"


@pytest.fixture(scope="module")
def finished(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a branch, an evaluation, a refit and two quantizations."""
    folder = tmp_path_factory.mktemp("report")
    evaluation = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
    output = run(write_recipe(folder, make_checkpoint("glm"), STAGES, evaluation=evaluation), pictures=True)
    assert "report.html" not in output  # nothing went wrong with it
    return folder / "out"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be changed, without the weights."""
    ignored = shutil.ignore_patterns("*.safetensors", ".work", "tokenizer.json", "report.html")
    return Path(shutil.copytree(finished, tmp_path / "copy", ignore=ignored))


@pytest.fixture
def light(copy: Path) -> Path:
    """The same with few records of stages, which are quick to draw."""
    for name in ("02-heads", "03-refit", "05-int8"):
        (copy / name / "stage.json").unlink()
    return copy


def change(file: Path, edit: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def report(*runs: Path, name: str = "report.html") -> Page:
    """The page that the command writes."""
    result = invoke("report", *runs)
    assert result.exit_code == 0, result.output
    assert result.output.split() == ["report:", str(runs[0] / name)]
    return read_page(runs[0] / name)


def mmlu(**correct: str) -> dict[str, Any]:
    """A result of the task `mmlu` from the answers by subject."""
    subjects = {
        name: {"accuracy": answers.count("1") / len(answers), "questions": len(answers), "correct": answers}
        for name, answers in correct.items()
    }
    answers = "".join(correct.values())
    total = {"accuracy": answers.count("1") / len(answers), "stderr": 0.05, "questions": len(answers)}
    return total | {"subjects": subjects, "num_fewshot": 5}


def give_scores(folder: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Record results of `mmlu` for some rows."""

    def edit(metrics: dict[str, Any]) -> None:
        for row in metrics["stages"]:
            if row["name"] in scores:
                row["accuracy"] = scores[row["name"]]["accuracy"]
                row["evaluations"]["mmlu"] = scores[row["name"]]

    change(folder / "metrics.json", edit)


def test_a_run_writes_the_page_that_the_command_writes(finished: Path, tmp_path: Path):
    written = (finished / "report.html").read_bytes()
    assert invoke("report", finished, "--output", tmp_path / "new" / "page.html").exit_code == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == written
    assert report(finished).files
    assert (finished / "report.html").read_bytes() == written
    assert not list(finished.glob(".*.partial"))
    assert len(written) < 500_000


def test_the_page_shows_the_run(finished: Path):
    page = read_page(finished / "report.html")
    manifest = json.loads((finished / "manifest.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    shown = " ".join(page.text())
    assert page.text("h1") == ["test"]
    for words in ("4 layers", "3 layers", "6 heads, 2 KV", "vocabulary 512", "untied", "INT8, groups of 32"):
        assert words in shown, words
    for words in (manifest["source"]["folder"], manifest["written"], manifest["versions"]["torch"], "INT4 and INT8"):
        assert words in shown, words
    # The picture of the chain, what two final checkpoints come to, and a section for each checkpoint.
    assert [text for text in page.text("a") if text in CHECKPOINTS] == CHECKPOINTS
    headings = page.text("h3")
    assert headings[:2] == ["05-int8", "06-mixed"]
    assert headings[-5:] == CHECKPOINTS
    assert f"{metrics['stages'][-1]['perplexity'] / metrics['stages'][0]['perplexity']:.4g} × the source's" in shown
    assert "No picture" not in shown
    assert "No errors" not in shown
    # Chain rails, one curve, costs, five plots of stages, and errors by layer of three of them.
    assert page.tags.count("svg") == 6 + 1 + 1 + 5 + 3
    assert {"curve-perplexity", "cost-bars", "plot-01-depth"} < set(page.ids)
    assert {"heat-03-refit", "heat-06-mixed"} < set(page.ids)


def test_every_number_can_be_downloaded(finished: Path):
    page = read_page(finished / "report.html")
    rows = json.loads((finished / "metrics.json").read_text())["stages"]
    found, as_csv = page.json("stages.json"), page.csv("stages.csv")
    assert [row["stage"] for row in found] == [row["name"] for row in rows]
    for field in ("parameters", "bytes", "perplexity", "seconds", "peak_rss_bytes"):
        assert [row[field] for row in found] == [row[field] for row in rows]
        assert [float(row[field]) for row in as_csv] == [row[field] for row in rows]
    assert found[-1]["perplexity_delta"] == rows[-1]["perplexity_delta_source"]
    assert found[0]["kv_cache_bytes"] == 4 * 2 * 16 * 2 * 2 * 1000
    stage = json.loads((finished / "06-mixed" / "stage.json").read_text())
    assert found[-1]["kl_divergence"] == stage["decisions"]["agreement"]["kl_divergence"]
    assert page.json("06-mixed.json") == stage["decisions"]
    layers = page.json("06-mixed-layers.json")
    first = next(row for row in layers if (row["layer"], row["part"]) == (0, "mlp.down_proj"))
    assert first["weight_error"] == stage["decisions"]["layers"][0]["weight_error"]["mlp.down_proj"]
    assert first["bits"] in (4, 8)
    refit = json.loads((finished / "03-refit" / "stage.json").read_text())["decisions"]
    row = page.csv("03-refit-layers.csv")[0]
    fit = refit["layers"][0][row["part"]]
    assert (float(row["error_before"]), float(row["error_after"])) == (fit["error_before"], fit["error_after"])


def test_subjects_against_the_source_in_order_of_loss(light: Path):
    source, last = mmlu(law="1111", art="11111", old_age="00"), mmlu(law="1110", art="11000", old_age="01")
    give_scores(light, {"source": source, "05-int8": source, "06-mixed": last})
    page = report(light)
    rows = page.json("subjects.json")
    assert [row["subject"] for row in rows] == ["art", "law", "old age"]
    assert [row["questions"] for row in rows] == [5, 4, 2]
    assert [row["06-mixed"] for row in rows] == pytest.approx([-0.6, -0.25, 0.5])
    assert [row["05-int8"] for row in rows] == [0, 0, 0]
    # Paired: the differences of art are 0, 0, -1, -1, -1.
    assert rows[0]["06-mixed_stderr"] == pytest.approx(math.sqrt(0.3 / 5))
    stages = page.json("stages.json")
    differences = [0, 0, 0, -1, 0, 0, -1, -1, -1, 0, 1]
    mean = sum(differences) / 11
    assert stages[-1]["accuracy_delta"] == pytest.approx(mean)
    spread = sum((difference - mean) ** 2 for difference in differences) / 10
    assert stages[-1]["accuracy_delta_stderr"] == pytest.approx(math.sqrt(spread / 11))
    assert stages[-2]["accuracy_delta"] == 0
    assert stages[-2]["accuracy_delta_stderr"] is None
    assert "curve-accuracy" in page.ids


def test_categories_and_other_tasks(light: Path):
    part = {"accuracy": 0.5, "stderr": 0.1, "questions": 4}
    result = mmlu(law="11", art="10") | {"categories": {"humanities": part, "other": part}}
    give_scores(light, {"source": result, "05-int8": result})
    change(light / "metrics.json", lambda metrics: metrics["stages"][1]["evaluations"].update(piqa={"acc": 0.7}))
    page = report(light)
    assert [row["category"] for row in page.json("categories.json")] == ["humanities", "other"]
    assert page.json("other-tasks.json") == [{"stage": "01-depth", "piqa acc": 0.7}]


def test_accuracy_of_an_older_version_has_no_standard_error(light: Path):
    old = {"accuracy": 0.5, "subjects": {"law": {"accuracy": 0.5}, "art": {"accuracy": 0.5}}}
    give_scores(light, {"source": old, "06-mixed": old | {"accuracy": 0.25}})
    page = report(light)
    assert page.json("stages.json")[-1]["accuracy_delta"] == -0.25
    assert "accuracy_delta_stderr" not in page.json("stages.json")[-1]


def test_what_comes_from_files_is_text_only(light: Path):
    give_scores(light, {name: mmlu(**{EVIL: "10", "law": "11"}) for name in ("source", "06-mixed")})
    change(light / "metrics.json", lambda metrics: metrics.update(recipe=EVIL))
    change(light / "metrics.json", lambda metrics: metrics["stages"][-1]["evaluations"].update({EVIL: {EVIL: 1}}))

    def edit_stage(stage: dict[str, Any]) -> None:
        stage["warnings"] = [EVIL]
        stage["options"][EVIL] = EVIL
        for layer in stage["decisions"]["layers"]:
            layer["weight_error"][EVIL] = 0.1
        stage["linears"] += [{"layer": layer, "part": EVIL, "weight_error": 0.1, EVIL: EVIL} for layer in (0, 1)]

    change(light / "06-mixed" / "stage.json", edit_stage)
    change(light / "manifest.json", lambda manifest: manifest["versions"].update({EVIL: EVIL}))
    page = report(light)  # which allows one script, no handler, and no element that is not closed
    assert page.text("h1") == page.text("title") == [EVIL]
    assert EVIL in page.text("td")
    assert EVIL in page.text("text")
    assert EVIL in page.text("dt")
    assert EVIL in page.text("p")
    assert page.json("06-mixed.json")["layers"][0]["weight_error"][EVIL] == 0.1
    assert "No picture" not in " ".join(page.text())


def test_the_warnings_of_a_stage_are_shown(light: Path):
    assert json.loads((light / "06-mixed" / "stage.json").read_text())["warnings"] == []
    change(light / "01-depth" / "stage.json", lambda stage: stage.update(warnings=["mind the gap"]))
    assert "mind the gap" in report(light).text("p")


def test_what_is_absent_is_left_out(tmp_path: Path):
    rows = [{"name": "source", "stage": "source"}, {"name": "01-depth", "stage": "depth"}]
    (tmp_path / "metrics.json").write_text(json.dumps({"recipe": "old", "stages": rows}))
    page = report(tmp_path)
    assert page.json("stages.json") == [{"stage": row["name"], "kind": row["stage"]} for row in rows]
    assert "None" not in " ".join(page.text())


@pytest.mark.parametrize("field", ["parent", "shape_before", "decisions", "options"])
def test_each_field_of_a_record_may_be_absent(light: Path, field: str):
    """As in the records of older versions; what is drawn from it may be missing, the page is there."""
    for file in light.glob("*/stage.json"):
        change(file, lambda stage: stage.pop(field))
    assert len(report(light).json("stages.json")) == len(STAGES) + 1


def test_perplexities_that_are_no_numbers(light: Path):
    def edit(metrics: dict[str, Any]) -> None:
        metrics["stages"][1]["perplexity"] = math.nan
        metrics["stages"][-1]["perplexity"] = math.inf

    change(light / "metrics.json", edit)
    page = report(light)
    assert page.json("stages.json")[-1]["perplexity"] is None
    assert {"nan", "inf"} <= set(page.text("td"))


def test_a_damaged_decision_costs_its_picture_alone(copy: Path):
    change(copy / "03-refit" / "stage.json", lambda stage: stage["decisions"].update(layers=[{"mlp": 3}]))
    change(copy / "03-refit" / "stage.json", lambda stage: stage["linears"][0].update(error_after=[3]))
    shown = " ".join(report(copy).text())
    assert_says(shown, "No picture of what 03-refit decided: TypeError", "No errors by layer: TypeError", "06-mixed")


def test_bad_input_is_one_message(copy: Path, tmp_path: Path):
    assert_says(refusal("report", tmp_path / "nowhere"), tmp_path / "nowhere", "no such folder", "wrote")
    (tmp_path / "empty").mkdir()
    assert_says(refusal("report", tmp_path / "empty"), "metrics.json", "not the folder of a run")
    metrics = copy / "metrics.json"
    whole = metrics.read_text()
    for content, words in {
        whole[:100]: ["not JSON"],
        "[]": ["all of it", "given '[]'"],
        "{}": ["recipe: absent"],
        '{"recipe": "r", "stages": []}': ["stages", "at least 1"],
        '{"recipe": "r", "stages": [{"name": "../x", "stage": "depth"}]}': ["'../x'"],
        whole.replace('"parameters": ', '"parameters": "many", "x": '): ["stages.0.parameters", "many"],
    }.items():
        metrics.write_text(content)
        assert_says(refusal("report", copy), metrics, "Run the recipe again", *words)
    metrics.write_text(whole)
    change(metrics, lambda data: data["stages"][0]["evaluations"].update(mmlu={"accuracy": "good"}))
    assert_says(refusal("report", copy), "stages.0.evaluations.mmlu.accuracy", "good")
    metrics.write_text(whole)
    assert_says(refusal("report", copy, "--output", metrics / "page.html"), "page.html", "cannot write", "--output")
    (copy / "05-int8" / "stage.json").write_text("{")
    assert_says(refusal("report", copy), copy / "05-int8" / "stage.json", "not JSON")
    metrics.unlink()
    assert_says(refusal("report", copy), metrics, "no stage of this run is finished")


def test_a_page_that_fails_costs_the_page_alone(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> str:
        raise KeyError("no such thing")

    monkeypatch.setattr(page_module, "run_page", fail)
    output = run(write_recipe(tmp_path, make_checkpoint("glm"), STAGES[:1]))
    assert output.count("no report.html: KeyError: 'no such thing'") == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_several_runs_are_compared(finished: Path, copy: Path):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["stages"][0] |= {"method": "angular", "name": "shorter"}
        manifest["recipe"]["stages"][-1]["budget"]["average_bits"] = 5.5
        manifest["recipe"]["evaluation"]["perplexity"]["samples"] = 3

    change(copy / "manifest.json", edit)
    change(copy / "metrics.json", lambda metrics: metrics.update(recipe=EVIL))
    page = report(copy, finished, name="comparison.html")
    assert page.text("h1") == [f"{EVIL}, test"]
    found = {row["field"]: (row[EVIL], row["test"]) for row in page.json("recipes.json")}
    assert found["stages.mixed.budget.average_bits"] == ("5.5", "6.0")
    assert found["stages.shorter"][1] is found["stages.depth"][0] is None
    assert_says(found["stages.shorter"][0], "stage: depth", "layers: [0, 1, 3]", "method: angular")
    assert found["stages"][0] == "shorter → heads → refit → evaluate → int8 → mixed"
    assert found["evaluation.perplexity.samples"] == ("3", "2")
    assert "seed" not in found
    assert "stages.heads.method" not in found
    assert any("evaluation.perplexity.samples" in text for text in page.text("p"))
    finals = page.json("finals.json")
    assert [(row["run"], row["checkpoint"]) for row in finals] == [
        (run, name) for run in (EVIL, "test") for name in ("source", "05-int8", "06-mixed")
    ]
    assert page.tags.count("svg") == 1
    assert {EVIL, "test"} <= set(page.text("text"))
    written = (copy / "comparison.html").read_bytes()
    report(copy, finished, name="comparison.html")
    assert (copy / "comparison.html").read_bytes() == written


def test_runs_of_one_name_are_told_apart_by_their_folders(finished: Path, copy: Path):
    page = report(copy, finished, name="comparison.html")
    assert page.text("h1") == [f"test ({copy}), test ({finished})"]
    assert "No field differs." in page.text("p")


CLICK = """<script>
const button = (name) => [...document.querySelectorAll("#table-stages th button")]
  .find((found) => found.textContent === name);
const shown = () => [...document.querySelectorAll("#table-stages tbody tr")].map((row) => row.cells[0].textContent);
const seen = [];
button("size").click(); seen.push(shown());
button("size").click(); seen.push(shown());
button("KL").click(); seen.push(shown());
document.title = JSON.stringify({seen, wide: document.documentElement.scrollWidth > innerWidth});
</script>"""


def test_in_a_browser_it_loads_and_its_tables_sort(finished: Path, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome here")
    html = (finished / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(html.replace("</body>", CLICK + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=390,900", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert ":CONSOLE" not in done.stderr
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"'))
    rows = json.loads((finished / "metrics.json").read_text())["stages"]
    up, down, by_divergence = found["seen"]
    by_size = sorted(rows, key=lambda row: row["bytes"])
    assert up == [row["name"] for row in by_size]
    assert [name for name in down if "-" not in name] == ["source"]
    assert down[0] == by_size[-1]["name"]
    assert set(by_divergence[:2]) == {"05-int8", "06-mixed"}
    assert found["wide"] is False
