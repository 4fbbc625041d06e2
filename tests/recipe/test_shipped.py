"""The recipes that come with the package: found by name, listed, shown, built upon and copied."""

import json
from pathlib import Path

import pytest
import yaml

from autoglm_compress.recipe import load_recipe
from support.command_line import assert_says, plan, refusal, shapes
from support.places import GLM, GLM4V, OMNI, QWEN, RECIPES, ROOT
from support.running import invoke

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
EMBEDDED = {"demo": ROOT / "reference_model" / "checkpoint"}
EMBEDDED |= {"omni-demo": ROOT / "reference_model" / "omni" / "checkpoint"}
MODELS = EMBEDDED | {"glm4-9b": GLM}
MODELS |= {name: GLM4V for name in NAMES if name.startswith("autoglm")} | {"autoglm-phone-omni": OMNI}


def model(name: str) -> str:
    """A local model in the place of the recipe's, as an assignment."""
    return f"model.source={MODELS.get(name, QWEN)}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def recipes(*arguments: object) -> str:
    result = invoke("recipes", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_recipe_is_listed_in_a_line_that_says_what_it_does():
    lines = recipes().splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert max(map(len, lines)) <= 80
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_file(name: str):
    assert recipes(name) == (RECIPES / f"{name}.yaml").read_text()
    by_name = shapes(name, "--set", model(name))
    assert by_name == shapes(RECIPES / f"{name}.yaml", "--set", model(name))


def test_a_name_wins_over_a_file_and_a_path_does_not(elsewhere: Path):
    mine = {"name": "mine", "model": {"source": str(QWEN)}, "stages": [{"stage": "depth", "num_hidden_layers": 5}]}
    (elsewhere / "demo").write_text(yaml.safe_dump(mine))
    result = invoke("plan", "demo")
    assert_says(result.output, "note: demo is the package's recipe; the file of this name is ./demo", "09-int8")
    assert shapes("./demo")[-1]["num_hidden_layers"] == 5
    assert "note" not in invoke("plan", "./demo").output
    assert load_recipe(Path("demo")).name == "mine"
    assert load_recipe("demo").name == "demo"


def test_a_recipe_that_is_not_there():
    for name in ("dem", "recipes/demo.yaml"):
        assert_says(refusal("plan", name), f"{name}: cannot read it: No such file", "did you mean demo?", *NAMES)
    for arguments in (("recipes", "phone"), ("recipes", "phone", "--copy", "mine")):
        assert_says(refusal(*arguments), "phone: no recipe of the package", "did you mean phone9b?")
    for arguments in (("recipes", ""), ("run", ""), ("plan", ""), ("recipes", "", "--copy", "mine")):
        assert_says(refusal(*arguments), "the name of the recipe is empty", *NAMES)
    assert_says(refusal("recipes", "--copy", "mine"), "--copy: name the recipe to copy")


def test_a_recipe_of_ones_own_on_a_base_of_the_package(elsewhere: Path):
    """What the base names beside it is found, wherever the recipe is."""
    own = {"base": "phone9b", "name": "mine", "stages": [{"stage": "depth", "num_hidden_layers": 30}]}
    (elsewhere / "mine.yaml").write_text(yaml.safe_dump(own))
    planned = plan("mine.yaml", "--set", model("phone9b"))["checkpoints"]
    assert [entry["shape"]["num_hidden_layers"] for entry in planned] == [36, 30]
    sources = load_recipe("mine.yaml").calibration.rows
    assert [Path(source).name for source in sources] == ["phone_assistant.jsonl", "multiple_choice.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_all_that_the_recipe_names(name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    assert_says(recipes(name, "--copy", "mine"), "files in mine", f"plan mine/recipes/{name}.yaml")
    copy = elsewhere / "mine" / "recipes" / f"{name}.yaml"
    assert copy.read_text() == (RECIPES / f"{name}.yaml").read_text()
    recipe = load_recipe(copy)
    assert recipe.bases == [copy.parent, elsewhere]
    changes = () if name in EMBEDDED else ("--set", model(name))
    assert shapes(copy, *changes) == shapes(name, *changes)
    copied = [file.relative_to(elsewhere / "mine") for file in (elsewhere / "mine").rglob("*") if file.is_file()]
    assert all((ROOT / file).read_bytes() == (elsewhere / "mine" / file).read_bytes() for file in copied)
    if name == "int4-only":
        assert sorted(map(str, copied)) == [
            "calib_data/multiple_choice.jsonl",
            "calib_data/phone_assistant.jsonl",
            "recipes/int4-only.yaml",
            "recipes/phone9b.yaml",
        ]


def test_copies_stand_beside_each_other_and_replace_nothing(elsewhere: Path):
    recipes("int4-only", "--copy", "mine")
    recipes("glm4-9b", "--copy", "mine")
    recipes("glm4-9b", "--copy", "mine")
    changed = elsewhere / "mine" / "recipes" / "phone9b.yaml"
    changed.write_text("name: changed\n")
    message = refusal("recipes", "phone-lite", "--copy", "mine")
    assert_says(message, "mine/recipes/phone9b.yaml exists with other content", "Give another folder")
    assert changed.read_text() == "name: changed\n"
    assert not (changed.parent / "phone-lite.yaml").exists()
    (elsewhere / "file").write_text("")
    assert_says(refusal("recipes", "demo", "--copy", "file"), "--copy: cannot write to file")
    (elsewhere / "sub").mkdir()
    (elsewhere / "sub" / "recipes").write_text("")
    assert_says(refusal("recipes", "demo", "--copy", "sub"), "--copy: cannot write to sub/recipes: File exists")


def test_changes_by_path_are_those_of_set():
    changes = {
        "stages.depth.num_hidden_layers": 20,
        "calibration": {"samples": 8},
        "model.source": QWEN,
        "keep": "none",
    }
    texts = [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
    assert load_recipe("phone9b", changes) == load_recipe("phone9b", texts)
    assert load_recipe("phone9b", changes).stages[0].num_hidden_layers == 20


def test_changes_leave_what_they_were_given_as_it_was():
    evaluation = {"every_stage": ["perplexity"]}
    changed = load_recipe("demo", {"evaluation": evaluation, "evaluation.every_stage": []})
    assert changed.evaluation.every_stage == ()
    assert evaluation == {"every_stage": ["perplexity"]}
