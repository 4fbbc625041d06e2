"""`keep`: checkpoints that others were made from go when they have served, and come back when they are needed."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from support.command_line import plan
from support.running import Kill, digests, run, run_until_killed, stage_folders, write_recipe

torch.set_num_threads(1)
STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "layers": [0, 2, 3]},
    {"stage": "ffn", "intermediate_size": 96, "method": "magnitude"},
    {"stage": "heads", "num_attention_heads": 6, "method": "magnitude"},
    {"stage": "evaluate", "tasks": ["perplexity"]},
    {"stage": "quantize", "name": "int8", "bits": 8, "group_size": 32, "method": "round_to_nearest"},
    {"stage": "quantize", "name": "int4", "from": "heads", "bits": 4, "group_size": 32, "method": "round_to_nearest"},
]
NAMES = ["01-depth", "02-ffn", "03-heads", "05-int8", "06-int4"]
ENDS = NAMES[3:]

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write the recipe into a folder, with changed options of stages by their names, or with other top-level keys."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"This is about the number {number}."}) for number in range(300)))
    calibration = {"source": str(text), "samples": 4, "sequence_length": 32}

    def write(folder: Path, changes: dict[str, dict[str, Any]] | None = None, **top: Any) -> Path:
        stages = [stage | (changes or {}).get(stage.get("name", stage["stage"]), {}) for stage in STAGES]
        return write_recipe(folder, make_checkpoint("glm"), stages, **({"calibration": calibration} | top))

    return write


@pytest.fixture(scope="module")
def all_kept(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that keeps everything."""
    recipe = write(tmp_path_factory.mktemp("all"))
    run(recipe)
    return recipe.parent / "out"


@pytest.fixture(scope="module")
def none_kept(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write(tmp_path_factory.mktemp("none"), keep="none")
    run(recipe)
    return recipe.parent / "out"


def with_weights(output: Path) -> list[str]:
    """The stages whose weights are there, all of them."""
    found = [folder.name for folder in stage_folders(output) if list(folder.glob("*.safetensors*"))]
    return [name for name in found if (output / name / "model.safetensors.index.json").exists()]


def weights(output: Path, *names: str) -> dict[str, str]:
    return {file: digest for file, digest in digests(output).items() if file.split("/")[0] in names}


def measured(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.json without what differs from run to run."""
    rows = json.loads((output / "metrics.json").read_text())["stages"]
    return [
        {name: value for name, value in row.items() if not name.endswith(("seconds", "_bytes", "processes"))}
        for row in rows
    ]


def test_only_the_ends_stay_and_all_that_was_measured(all_kept: Path, none_kept: Path):
    assert with_weights(all_kept) == NAMES
    assert with_weights(none_kept) == ENDS
    assert weights(none_kept, *ENDS) == weights(all_kept, *ENDS)
    assert measured(none_kept) == measured(all_kept)
    for name in NAMES[:3]:
        assert {"stage.json", "config.json", "plot.svg"} <= {file.name for file in (none_kept / name).iterdir()}
    finished = json.loads((none_kept / "manifest.json").read_text())["stages"]
    assert [stage["name"] for stage in finished if stage.get("dropped")] == NAMES[:3]


def test_the_last_one_that_others_were_made_from_can_stay(write: Write, all_kept: Path, tmp_path: Path):
    run(write(tmp_path, keep="last"))
    assert with_weights(tmp_path / "out") == NAMES[2:]
    assert weights(tmp_path / "out", *NAMES[2:]) == weights(all_kept, *NAMES[2:])


def test_a_finished_run_does_not_miss_what_it_dropped(write: Write, none_kept: Path, tmp_path: Path):
    copytree(none_kept, tmp_path / "out")
    before = digests(tmp_path / "out")
    for keep in ("none", "all"):
        output = run(write(tmp_path, keep=keep))
        assert output.count("finished before, reused") == len([*NAMES, "04-evaluate"])
        assert "running" not in output
        assert "evaluating" not in output
        assert digests(tmp_path / "out") == before
    assert measured(tmp_path / "out") == measured(none_kept)


def test_what_is_needed_again_is_made_again_and_goes_again(write: Write, none_kept: Path, tmp_path: Path):
    copytree(none_kept, tmp_path / "out")
    output = run(write(tmp_path, {"int4": {"group_size": -1}}, keep="none"))
    for name in NAMES[:3]:
        assert f"{name}: finished before, but not kept: done again for those that need it" in output
    assert "05-int8: finished before, reused" in output
    assert with_weights(tmp_path / "out") == ENDS
    elsewhere = write(tmp_path / "elsewhere", {"int4": {"group_size": -1}})
    run(elsewhere)
    assert weights(tmp_path / "out", *ENDS) == weights(tmp_path / "elsewhere" / "out", *ENDS)


def test_what_a_later_stage_takes_stays_until_then(write: Write, all_kept: Path, tmp_path: Path):
    recipe = write(tmp_path, keep="none")
    run(recipe, "--until", "int8")
    assert with_weights(tmp_path / "out") == ["03-heads", "05-int8"]  # int4 is still to be made from heads
    output = run(recipe)
    assert "done again" not in output
    assert with_weights(tmp_path / "out") == ENDS
    assert weights(tmp_path / "out", *ENDS) == weights(all_kept, *ENDS)


@pytest.mark.parametrize(
    "kill",
    [
        Kill("pathlib:Path.unlink", "01-depth/model", before=False),
        Kill("pathlib:Path.replace", "02-ffn/.stage.json"),
        Kill("pathlib:Path.rename", "03-heads/result", before=False),
    ],
    ids=["weights half gone", "not yet marked", "not yet gone"],
)
def test_a_run_killed_while_it_drops_arrives(write: Write, all_kept: Path, tmp_path: Path, kill: Kill):
    recipe = write(tmp_path, keep="none")
    assert run_until_killed(recipe, kill)
    assert "done again" not in run(recipe)
    assert with_weights(tmp_path / "out") == ENDS
    assert weights(tmp_path / "out", *ENDS) == weights(all_kept, *ENDS)


def test_plan_says_what_is_needed_at_most_and_what_stays(write: Write, tmp_path: Path):
    planned = {keep: plan(write(tmp_path, keep=keep)) for keep in ("all", "last", "none")}
    sizes = {entry["name"]: entry["disk_bytes"] for entry in planned["all"]["checkpoints"]}
    scratch = planned["all"]["disk_bytes_needed"] - sum(sizes.values())
    assert planned["all"]["disk_bytes_kept"] == sum(sizes.values())
    assert planned["none"]["disk_bytes_kept"] == sizes["05-int8"] + sizes["06-int4"]
    assert planned["last"]["disk_bytes_kept"] == planned["none"]["disk_bytes_kept"] + sizes["03-heads"]
    # The first two stand beside each other, or the last three.
    most = max(sizes["01-depth"] + sizes["02-ffn"], sizes["03-heads"] + sizes["05-int8"] + sizes["06-int4"])
    assert planned["none"]["disk_bytes_needed"] == planned["last"]["disk_bytes_needed"] == most + scratch
