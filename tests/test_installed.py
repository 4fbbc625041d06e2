"""The package after `pip install`, in an empty folder: the wheel, and an editable install of a checkout."""

import json
import zipfile
from pathlib import Path

import pytest

from support.installing import Environment, environment, sources, wheel
from support.places import GLM, GLM4V, OMNI, QWEN, ROOT

RECIPES = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
MOST_BYTES = 30_000_000
PLANS = """
import sys
from pathlib import Path
from autoglm_compress import __file__ as place
from autoglm_compress.cli import app

assert Path(place).is_relative_to(sys.prefix), place
for arguments in {commands!r}:
    app(arguments, standalone_mode=False)
"""
SHORT = {
    "calibration": {"source": "python-docs", "samples": 4, "sequence_length": 64},
    "evaluation": {"every_stage": ["mmlu"], "mmlu": {"data": "../calib_data/quiz", "limit": 1, "num_fewshot": 1}},
    "stages": [{"stage": "ffn", "intermediate_size": "0.75x"}],
}
"""Of the demo: one stage, and one question of each subject."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    return wheel(sources(folder / "sources"), folder / "wheels")


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = environment(tmp_path_factory.mktemp("installed"))
    made.install(built)
    return made


def test_the_wheel_holds_the_package_and_what_its_recipes_name(built: Path):
    assert built.stat().st_size < MOST_BYTES
    held = set(zipfile.ZipFile(built).namelist())
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "autoglm_compress").rglob("*.py")}
    assert modules == {name for name in held if name.endswith(".py")}
    beside = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "calib_data").rglob("*.*")]
    for folder in ("checkpoint", "omni/checkpoint", "omni/data"):
        beside += [file for file in (ROOT / "reference_model" / folder).rglob("*") if file.is_file()]
    assert {f"autoglm_compress/bundled/{file.relative_to(ROOT)}" for file in beside} == {
        name for name in held if name.startswith("autoglm_compress/bundled/")
    }


def test_every_recipe_is_planned_in_an_empty_folder(installed: Environment):
    listed = installed.run("autoglm-compress", "recipes").splitlines()
    assert {line.split()[0] for line in listed} == RECIPES
    shapes = {"glm4": GLM, "autoglm": GLM4V}
    embedded = ("demo", "omni-demo")
    models = {name: shapes.get(name.split("-")[0], QWEN) for name in RECIPES.difference(embedded)}
    models["autoglm-phone-omni"] = OMNI
    commands = [["plan", name, "--set", f"model.source={at}"] for name, at in models.items()]
    commands += [["plan", name] for name in embedded]
    shown = installed.run("python", "-c", PLANS.format(commands=commands))
    assert shown.count("\ndisk: ") == len(RECIPES)
    assert list(installed.empty.iterdir()) == []


def test_the_demo_runs_in_an_empty_folder(installed: Environment):
    changes = [f"--set={name}={json.dumps(value)}" for name, value in SHORT.items()]
    installed.run("autoglm-compress", "run", "demo", *changes, "--device", "cpu")
    assert [path.name for path in installed.empty.iterdir()] == ["runs"]
    rows = json.loads((installed.empty / "runs" / "demo" / "metrics.json").read_text())["stages"]
    assert [row["name"] for row in rows] == ["source", "01-ffn"]
    assert all(row["accuracy"] is not None for row in rows)


def test_an_editable_install_has_the_recipes_of_the_checkout(tmp_path: Path):
    checkout = sources(tmp_path / "checkout")
    made = environment(tmp_path)
    made.install("--editable", checkout)
    assert {line.split()[0] for line in made.run("autoglm-compress", "recipes").splitlines()} == RECIPES
    (checkout / "recipes" / "mine.yaml").write_text("# A recipe of my own.\nname: mine\n")
    assert "mine" in made.run("autoglm-compress", "recipes")
    assert made.run("autoglm-compress", "recipes", "mine").startswith("# A recipe of my own.")
