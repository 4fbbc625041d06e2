"""The functions for Python: the commands' results as records, their refusals as UserError, and a quick import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import autoglm_compress
from autoglm_compress import (
    Checkpoint,
    UserError,
    compare,
    evaluate,
    export_checkpoint,
    load_recipe,
    plan,
    push,
    run,
)
from support.command_line import plan as plan_command
from support.command_line import refusal
from support.places import QWEN
from support.running import invoke, write_recipe

MakeCheckpoint = Callable[..., Path]
STAGES = [{"stage": "ffn", "intermediate_size": 96}, {"stage": "depth", "name": "shorter", "layers": [0, 1]}]
TEXT = {"samples": 4, "sequence_length": 32}


@pytest.fixture
def recipe(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    evaluation = {"every_stage": ["perplexity"], "perplexity": {"samples": 2, "sequence_length": 32}}
    return write_recipe(tmp_path, make_checkpoint("glm"), STAGES, evaluation=evaluation)


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        (
            "import autoglm_compress; autoglm_compress.__version__, dir(autoglm_compress)",
            {"rich", "pydantic", "yaml", "torch"},
        ),
        ("import autoglm_compress.cli", {"pydantic", "torch"}),
        ("from autoglm_compress import compare", {"torch"}),
        ("from autoglm_compress import evaluate", {"autoglm_compress.stages", "scipy"}),
        ("from autoglm_compress import run", {"autoglm_compress.comparison", "lm_eval"}),
    ],
)
def test_nothing_is_imported_before_it_is_needed(statement: str, heavy: set[str]):
    script = f"import sys; {statement}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "autoglm_compress" in loaded
    assert not heavy & set(loaded)


def test_all_names_are_there():
    assert {
        "load_recipe",
        "plan",
        "run",
        "evaluate",
        "compare",
        "export_checkpoint",
        "push",
        "Checkpoint",
        "__version__",
    } <= set(autoglm_compress.__all__)
    assert all(getattr(autoglm_compress, name) is not None for name in autoglm_compress.__all__)
    assert set(autoglm_compress.__all__) <= set(dir(autoglm_compress))
    with pytest.raises(AttributeError, match="no attribute 'planned'"):
        autoglm_compress.planned  # noqa: B018


def test_a_plan_is_what_the_command_prints(recipe: Path, tmp_path: Path):
    planned = plan(recipe, tmp_path / "out").as_data()
    printed = plan_command(recipe, "--output", tmp_path / "out")
    free = "disk_bytes_free"  # of a disk that others write to
    assert planned.keys() == printed.keys()
    assert planned | {free: 0} == printed | {free: 0}


def test_a_run_gives_its_folder_and_rows(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = run(recipe, tmp_path / "out", device="cpu")
    assert capsys.readouterr() == ("", "")
    assert [row.name for row in result.rows] == ["source", "01-ffn", "02-shorter"]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["stages"]
    assert [row.as_data() for row in result.rows] == written
    assert result.row("shorter").perplexity == written[2]["perplexity"]
    shorter = Checkpoint(str(result.checkpoint("shorter")))
    assert shorter.shape.num_hidden_layers == 2
    with pytest.raises(UserError, match="no row 'longer'; there are source, ffn, shorter"):
        result.row("longer")
    with pytest.raises(UserError, match=r"model\.source"):
        result.checkpoint("source")

    before = (result.checkpoint("ffn") / "stage.json").read_bytes()
    again = run(load_recipe(recipe, {"stages.shorter.layers": [0]}), tmp_path / "out", device="cpu", progress=True)
    assert "01-ffn: finished before, reused" in capsys.readouterr().out
    assert (again.checkpoint("ffn") / "stage.json").read_bytes() == before
    assert again.row("shorter").shape.num_hidden_layers == 1
    assert len(run(recipe, tmp_path / "one", device="cpu", last="ffn").rows) == 2


def test_results_are_those_of_the_commands(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    model, other = make_checkpoint("glm"), make_checkpoint("llama")
    record = evaluate(model, tmp_path / "a.json", ["perplexity"], against=model, device="cpu", **TEXT)
    options = ("--tasks", "perplexity", "--samples", 4, "--sequence-length", 32, "--against", model, "--device", "cpu")
    assert invoke("evaluate", model, "--output", tmp_path / "b.json", *options).exit_code == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert json.loads((tmp_path / "a.json").read_text())["tasks"] == written["tasks"]
    assert record.tasks["perplexity"].result["value"] == written["tasks"]["perplexity"]["result"]["value"]
    assert record.tasks["agreement"].result["top1"] == 1

    evaluate(other, tmp_path / "c.json", ["perplexity"], device="cpu", **TEXT)
    limits = {"max_perplexity_increase": 5.0, "confidence": 0.9}
    comparison = compare(tmp_path / "a.json", str(tmp_path / "c.json"), **limits)
    arguments = ("--max-perplexity-increase", 5, "--confidence", 0.9, "--json", tmp_path / "verdict.json")
    code = invoke("compare", tmp_path / "a.json", tmp_path / "c.json", *arguments).exit_code
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert {"pass": 0, "fail": 1, "undecided": 3}[comparison.verdict.value] == code
    assert comparison.verdict.value == verdict["verdict"]
    assert json.loads(comparison.model_dump_json())["measures"] == verdict["measures"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: load_recipe("phne"), "phne: cannot read it: No such file"),
        (lambda folder: load_recipe("demo", {"stages.depht.layers": [1]}), "--set stages.depht.layers=.*no stage"),
        (lambda folder: load_recipe("demo", {"stages..layers": 1}), "--set stages..layers=1: expected KEY=VALUE"),
        (lambda folder: load_recipe("demo", {"seed": -1}), "--set seed: seed: given -1"),
        (lambda folder: load_recipe(None), "recipe: given None: expected the name of a recipe or the path of a file"),
        (lambda folder: load_recipe({}), "recipe: given {}: expected the name"),
        (lambda folder: load_recipe("demo", [1]), r"changes: given \[1\]: expected values by path, or texts"),
        (lambda folder: load_recipe("demo", "sed=1"), "sed: unknown key"),
        (lambda folder: plan(5), "recipe: given 5: expected what load_recipe gave, the name"),
        (lambda folder: plan("demo", memory_limit="1MB"), "--memory-limit"),
        (lambda folder: plan("demo", memory_limit=1_000_000), "--memory-limit"),
        (lambda folder: plan("demo", memory_limit=1.5), r"memory_limit: given 1\.5: expected str \| int \| None"),
        (
            lambda folder: run("demo", folder, device="tpu"),
            r"device: given 'tpu': expected Literal\['auto', 'cpu'",
        ),
        (lambda folder: run("demo", folder, fresh="no"), "fresh: given 'no': expected bool"),
        (lambda folder: run("demo", folder, last="depht"), "--until: no stage 'depht'"),
        (lambda folder: evaluate(QWEN, folder / "a.json", limit=0), r"mmlu\.limit: given 0: .*greater than 0"),
        (lambda folder: evaluate(QWEN, folder / "a.json", subjects=[]), r"mmlu\.subjects: .*at least one"),
        (lambda folder: evaluate(QWEN, folder / "a.json", []), "--tasks: none given"),
        (lambda folder: evaluate(QWEN, folder / "a.json", "perplexty"), "task 'perplexty': .*Did you mean perplexity"),
        (lambda folder: evaluate(QWEN, folder / "a.json", device="tpu"), "device: given 'tpu'"),
        (lambda folder: evaluate(QWEN, folder), "is a folder"),
        (lambda folder: export_checkpoint(QWEN, folder / "a", "onyx"), "--format: given 'onyx'"),
        (lambda folder: export_checkpoint(QWEN, folder / "a", "gguf", embedding_bits=4), "--embedding-bits: given 4"),
        (lambda folder: export_checkpoint(QWEN, folder / "a", "gguf", memory_limit=1.5), r"memory_limit: given 1\.5"),
        (lambda folder: export_checkpoint(QWEN, folder / "a", "gguf"), "no weights"),
        (lambda folder: push(QWEN, "tiny"), "tiny: not a repo on the hub: the owner is missing"),
        (lambda folder: push(QWEN, "me/tiny", upload="yes"), "upload: given 'yes': expected bool"),
        (lambda folder: push(folder, "me/tiny"), r"no config\.json"),
        (lambda folder: evaluate(QWEN, folder / "a.json", family="none.yaml"), r"--family: no file 'none\.yaml'"),
        (lambda folder: compare(folder / "a.json", folder / "b.json"), r"a\.json: cannot be read"),
        (lambda folder: compare(folder / "a", folder / "b", max_drop=-1), "--max-drop: given -1"),
        (
            lambda folder: compare(folder / "a", folder / "b", max_drop="1"),
            "max_drop: given '1': expected float",
        ),
        (lambda folder: compare(folder / "a", folder / "b", max_loss=[1]), r"max_loss: given \[1\]: expected Mapping"),
        (lambda folder: Checkpoint(folder), r"no config\.json"),
    ],
)
def test_what_cannot_be_is_a_user_error(call: Callable[[Path], object], words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        call(tmp_path)


def test_a_tensor_that_is_not_there_is_named(make_checkpoint: MakeCheckpoint):
    model = Checkpoint(make_checkpoint("glm"))
    with pytest.raises(UserError, match=f"{model.folder}: no tensor 'nope': there are .*lm_head.weight"):
        model.read("nope")
    with pytest.raises(UserError, match=r"did you mean model\.norm\.weight"):
        model.read("model.norms.weight")
    with pytest.raises(UserError, match=r"'model\.norm': the checkpoint is not quantized"):
        model.read_integers("model.norm")


def test_the_command_says_the_same(tmp_path: Path):
    with pytest.raises(UserError) as error:
        compare(tmp_path / "a.json", tmp_path / "b.json")
    assert refusal("compare", tmp_path / "a.json", tmp_path / "b.json").strip() == str(error.value)
