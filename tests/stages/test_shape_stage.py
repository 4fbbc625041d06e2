"""The stage that finds sizes for a target, on tiny models of families with rules of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedTokenizerFast

from autoglm_compress.architecture import ModelShape
from autoglm_compress.architecture.loading_rules import refusal as loading_refusal
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.publishing.content import content_of
from autoglm_compress.stages.shape_trials import explicit
from autoglm_compress.stages.surgeries import surgeries
from support.command_line import assert_says, plan, refusal
from support.multimodal import save
from support.places import GLM4V, QWEN
from support.resuming import write_text
from support.running import (
    digests,
    half_written,
    just_written,
    load,
    run,
    run_until_killed,
    same_tensors,
    stage_folders,
    write_recipe,
)

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
SHAPE: dict[str, Any] = {"stage": "shape", "target": {"parameters": "0.7x"}}
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = write_text(tmp_path_factory.mktemp("text") / "text.jsonl", "This is about the number {}.")
    return {"source": str(text), "samples": 8, "sequence_length": 16}


@pytest.fixture(scope="module")
def llama(make_checkpoint: MakeCheckpoint) -> Path:
    """Its config takes only widths that the number of heads divides."""
    return make_checkpoint("llama", head_dim=8, num_hidden_layers=5)


@pytest.fixture(scope="module")
def finished(llama: Path, calibration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run whose later stages work on what was found."""
    later = [
        {"stage": "refit", "layer_passes": 0, "logit_passes": 0},
        {"stage": "quantize", "bits": 4, "group_size": -1, "method": "round_to_nearest", "max_divergence": 100},
    ]
    recipe = write_recipe(tmp_path_factory.mktemp("run"), llama, [SHAPE, *later], calibration=calibration)
    said = run(recipe)
    assert_says(said, "01-shape: the run decides the sizes", "of 18 at most", "nats")
    return recipe.parent / "out"


def decisions(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())["decisions"]


# What is found


def test_the_result_is_the_best_measured_one_within_the_target(finished: Path, llama: Path):
    source, found = Checkpoint(llama).shape, Checkpoint(finished / "01-shape").shape
    decided = decisions(finished / "01-shape")
    assert decided["limit"] == int(0.7 * source.parameters)
    assert decided["size"] == found.parameters <= decided["limit"]
    costs = [trial["kl_divergence"] for trial in decided["trials"]]
    assert len(costs) > 4
    assert costs == sorted(costs)
    assert decided["trials"][0]["sizes"] == found.cut_sizes
    assert found.hidden_size % found.num_attention_heads == 0


def test_every_later_stage_has_the_decided_sizes(finished: Path):
    sizes = Checkpoint(finished / "01-shape").shape.cut_sizes
    for folder in stage_folders(finished):
        assert json.loads((folder / "stage.json").read_text())["shape"].items() >= sizes.items()
    load(finished / "02-refit")
    rows = json.loads((finished / "metrics.json").read_text())["stages"]
    assert [row["parameters"] for row in rows[1:]] == [Checkpoint(finished / "01-shape").shape.parameters] * 3
    report = (finished / "report.html").read_text()
    assert "01-shape" in report


def test_the_written_recipe_gives_the_same_bytes_by_hand(finished: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((finished / "01-shape" / "recipe.yaml").read_text())
    written = yaml.safe_load(recipe.read_text())
    assert written["stages"] == [stage["options"] for stage in decisions(finished / "01-shape")["stages"]]
    run(recipe)
    assert same_tensors(stage_folders(tmp_path / "out")[-1], finished / "01-shape")
    lineages = [json.loads((folder / "lineage.json").read_text()) for folder in (stage_folders(tmp_path / "out")[-1],)]
    assert lineages == [json.loads((finished / "01-shape" / "lineage.json").read_text())]


def test_the_written_recipe_names_places_of_this_machine_and_is_not_uploaded(finished: Path):
    assert (finished / "01-shape" / "recipe.yaml").exists()
    uploaded = content_of(finished / "01-shape", "me/model", None).files
    assert "config.json" in uploaded
    assert "recipe.yaml" not in uploaded


@pytest.mark.parametrize(
    "kill",
    [
        just_written("measured.json", 7),
        half_written("01-shape/result/unit-00001"),
    ],
    ids=lambda kill: kill.argument,
)
def test_a_killed_search_goes_on_to_the_same_bytes(
    finished: Path, llama: Path, calibration: dict[str, Any], tmp_path: Path, kill
):
    recipe = write_recipe(tmp_path, llama, [SHAPE], calibration=calibration)
    assert run_until_killed(recipe, kill)
    assert "going on where an earlier run stopped" in run(recipe)
    undisturbed = {name: found for name, found in digests(finished).items() if name.startswith("01-shape")}
    assert digests(tmp_path / "out") == undisturbed


def test_a_model_that_derives_head_dim_loses_heads_and_width_together(
    tokenizer: PreTrainedTokenizerFast, calibration: dict[str, Any], tmp_path: Path
):
    source = save("glm4v", tmp_path / "model", tokenizer)
    before = Checkpoint(source).shape
    target = {"parameters": before.parameters // 2}
    run(write_recipe(tmp_path, source, [SHAPE | {"target": target}], calibration=calibration))
    [made] = stage_folders(tmp_path / "out")
    found = Checkpoint(made).shape
    assert found.parameters <= target["parameters"]
    assert found.hidden_size == found.num_attention_heads * found.head_dim
    written = yaml.safe_load((made / "recipe.yaml").read_text())
    names = [stage["stage"] for stage in written["stages"]]
    assert "heads" not in names
    assert ("width" in names) == (found.hidden_size < before.hidden_size)


# Orders


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_surgeries_lead_to_the_shape_over_shapes_that_load(data: st.DataObject):
    config = AutoConfig.for_model("llama", **{"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3})
    family_shape = ModelShape.of(_llama(), config)
    groups = data.draw(st.integers(1, 3))
    heads = groups * data.draw(st.integers(1, 3))
    sizes = family_shape.cut_sizes | {
        "num_hidden_layers": data.draw(st.integers(1, family_shape.num_hidden_layers)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": 64 * data.draw(st.integers(1, 9)),
    }
    wanted = family_shape.with_sizes(sizes)
    steps = surgeries(family_shape, wanted, "chain", lambda shape: loading_refusal(config, shape))
    if steps is None:
        between = [sizes | {"hidden_size": 576}, sizes | {"num_attention_heads": 9, "num_key_value_heads": 3}]
        together = loading_refusal(config, wanted) == "" and groups == 3
        assert not together
        shapes = [family_shape.with_sizes(found) for found in between]
        assert loading_refusal(config, wanted) or all(loading_refusal(config, shape) for shape in shapes)
        return
    shape = family_shape
    for stage in steps:
        shape = stage.plan(shape)
        assert loading_refusal(config, shape) == ""
        assert type(stage).model_validate(explicit(stage)) == stage
    assert shape == wanted


def _llama():
    from autoglm_compress.architecture.family_files import built_in

    return built_in()["LlamaForCausalLM"]


# Plans and refusals


@pytest.mark.parametrize("model", [QWEN, GLM4V], ids=["qwen3-8b", "glm-4.1v-9b"])
def test_plan_says_what_is_known_before(model: Path, tmp_path: Path):
    stages = [
        {"stage": "shape", "name": "parameters", "target": {"parameters": "3.6B"}},
        {"stage": "shape", "name": "bytes", "from": "source", "target": {"bytes": "4GB", "bits": 4}},
        {"stage": "shape", "name": "memory", "from": "source", "target": {"memory": "8GB", "context": 2048}},
    ]
    found = plan(write_recipe(tmp_path, model, stages))
    source, first, second, third = found["checkpoints"]
    assert_says(" ".join(found["warnings"]), "01-parameters: the run decides the sizes", "Target: 3.6B", "least:")
    assert 3.2e9 < first["parameters"] <= 3.6e9
    assert 4 * 2**30 < second["bytes"] < source["bytes"]  # in 16 bits
    assert 7e9 < third["bytes"] + 2.048 * third["kv_cache_bytes_per_1000_tokens"] <= 8e9
    assert min(entry["peak_memory_bytes_estimate"] for entry in (first, second, third)) > 1e9
    assert found["disk_bytes_needed"] > 2 * source["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, ["target: missing"]),
        ({"target": {}}, ["expected one of parameters, bytes and memory"]),
        ({"target": {"parameters": "0.8x", "bytes": "1GB"}}, ["expected one of parameters, bytes and memory"]),
        ({"target": {"parameters": "1.2x"}}, ["target.parameters", "'1.2x'", "a ratio below 1"]),
        ({"target": {"parameters": 0}}, ["target.parameters", "a ratio below 1"]),
        ({"target": {"bytes": "2 apples"}}, ["target.bytes", "2GB"]),
        ({"target": {"memory": "2GB"}}, ["expected memory and context together"]),
        ({"target": {"parameters": "3B", "bits": 4}}, ["bits belongs to bytes and memory"]),
        ({"target": {"bytes": "3GB", "group_size": 64}}, ["group_size belongs to bits"]),
        ({"target": {"parameters": "9B"}}, ["9B parameters: there are 8.19B parameters: give less"]),
        ({"target": {"parameters": "0.01x"}}, ["81.9M parameters: out of reach", "is the least"]),
        ({"target": {"bytes": "20GB"}}, ["20 GB: there are 16.4 GB: give less"]),
        ({"target": {"parameters": "0.8x"}, "multiple_of": 5000}, ["multiple_of", "5000: no sizes"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_work_starts(options: dict[str, Any], message: list[str], tmp_path: Path):
    assert_says(refusal("plan", write_recipe(tmp_path, QWEN, [{"stage": "shape"} | options])), *message)


def test_the_least_that_a_refusal_names_is_reached(tmp_path: Path):
    said = refusal("plan", write_recipe(tmp_path, QWEN, [SHAPE | {"target": {"bytes": 1000}}]))
    least = said.partition("out of reach: ")[2].partition(" is the least")[0]
    assert least.endswith("B")
    number, unit = least.split()
    above = f"{float(number) * 1.01:.4f}{unit}"
    plan(write_recipe(tmp_path, QWEN, [SHAPE | {"target": {"bytes": above}}]))


def test_a_later_stage_that_cannot_take_the_decided_sizes_says_so(
    finished: Path, llama: Path, calibration: dict[str, Any], tmp_path: Path
):
    """A stage that keeps as much as the plan had guessed, where the run left less."""
    [_, guessed] = plan(write_recipe(tmp_path, llama, [SHAPE], calibration=calibration))["checkpoints"]
    decided = Checkpoint(finished / "01-shape").shape
    later = {"depth": "num_hidden_layers", "ffn": "intermediate_size", "heads": "num_attention_heads"}
    later |= {"width": "hidden_size"}
    stage, size = next(
        (stage, size) for stage, size in later.items() if getattr(decided, size) < guessed["shape"][size]
    )
    copytree(finished, tmp_path / "out")
    stages = [SHAPE, {"stage": stage, size: guessed["shape"][size]}]
    recipe = write_recipe(tmp_path, llama, stages, calibration=calibration)
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, f"02-{stage}: {size}", "has decided these sizes")
