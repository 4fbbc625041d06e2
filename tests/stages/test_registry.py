"""Stages of other packages: they are found by their entry points, and one that is broken costs itself alone."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from autoglm_compress.architecture import ModelShape
from autoglm_compress.stages import Stage, broken_stages, registry, stage_types
from support.command_line import assert_says, refusal, shapes
from support.plug_ins import AddStage
from support.running import write_recipe


class Toy(Stage):
    """Leaves everything as it is."""

    stage: Literal["toy"]

    def plan(self, shape: ModelShape) -> ModelShape:
        return shape


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm")


def test_a_stage_of_another_package_can_be_planned(add_stage: AddStage, source: Path, tmp_path: Path):
    add_stage("toy", Toy)
    assert stage_types()["toy"] is Toy
    planned = shapes(write_recipe(tmp_path, source, [{"stage": "toy"}, {"stage": "depth", "layers": [0, 1]}]))
    assert [shape["num_hidden_layers"] for shape in planned] == [4, 4, 2]


def test_a_built_in_name_cannot_be_replaced_even_by_what_is_broken(add_stage: AddStage):
    add_stage("depth", Toy)
    add_stage("ffn", None)
    assert {stage_types()[name].__name__ for name in ("depth", "ffn")} == {"Depth", "Ffn"}
    assert broken_stages() == {}


def test_a_broken_stage_is_named_where_it_is_asked_for_and_the_rest_works(
    add_stage: AddStage, source: Path, tmp_path: Path
):
    add_stage("gone", None)
    add_stage("function", lambda: None)
    add_stage("toy", Toy)
    assert shapes(write_recipe(tmp_path, source, [{"stage": "toy"}, {"stage": "depth", "layers": [0, 1]}]))
    message = refusal(
        "plan", write_recipe(tmp_path, source, [{"stage": "gone"}, {"stage": "function"}, {"stage": "x"}])
    )
    lines = message.splitlines()
    gone, function, unknown = lines[1:]
    assert_says(gone, "stages.1.stage: the plug-in that brings 'gone' is broken", "someone_elses_stages:gone")
    assert_says(gone, "AttributeError", "Repair or update")
    assert_says(function, "stages.2.stage: the plug-in that brings 'function' is broken", "expected a subclass of")
    assert_says(unknown, "stages.3.stage: unknown stage 'x'", "toy")
    assert "gone" not in unknown


def test_the_package_of_a_broken_stage_is_named(add_stage: AddStage, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ImportError("no module\nnamed other")

    entry = SimpleNamespace(
        name="theirs",
        value="package.module:Theirs",
        load=fail,
        dist=SimpleNamespace(name="their-package", version="2.1"),
    )
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [entry])
    registry.plug_ins.cache_clear()
    assert broken_stages() == {
        "theirs": "entry point 'package.module:Theirs' of the package their-package 2.1: "
        "ImportError: no module named other"
    }
