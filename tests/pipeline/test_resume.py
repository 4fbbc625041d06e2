"""Running again: what is finished stays, and exactly what changed is redone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.resuming import CHECKPOINTS, NAMES, STAGES, Write, said, write_text
from support.running import digests, invoke, load, result_folders, run, stage_folders

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file below a folder was written, and its bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def run_and_compare(recipe: Path, *arguments: str) -> tuple[str, list[str]]:
    """What the user saw, and the stages whose folders are the same files as before."""
    folders = {folder.name: state(folder) for folder in result_folders(recipe.parent / "out")}
    output = run(recipe, *arguments)
    return output, [f.name for f in result_folders(recipe.parent / "out") if folders.get(f.name) == state(f)]


# Nothing changed


def test_a_second_run_does_nothing_again(finished: Path):
    before = state(finished.parent / "out")
    output, same = run_and_compare(finished)
    assert same == said(output, "finished before, reused") == NAMES
    assert not re.search("running|evaluating|measure|quantize:|write:", output)
    after = state(finished.parent / "out")
    rewritten = {name for name in after if before.get(name) != after[name]}
    assert rewritten <= {"manifest.json", "metrics.json", "report.html"}
    assert after["metrics.json"][1] == before["metrics.json"][1]
    assert before.keys() == after.keys()


def test_the_same_recipe_gives_the_same_bytes_elsewhere(write: Write, tmp_path: Path, undisturbed: dict[str, str]):
    run(write(tmp_path))
    assert digests(tmp_path / "out") == undisturbed
    assert {Path(name).parent.name for name in undisturbed} == set(CHECKPOINTS)


def test_work_leaves_nothing_behind_but_statistics(finished: Path):
    left = [path.name for path in (finished.parent / "out" / ".work").iterdir()]
    assert len(left) == 1
    assert left[0].startswith("statistics-")


# Something changed


@pytest.mark.parametrize(
    ("changes", "top", "redone"),
    [
        ({"int8": {"group_size": -1}}, {}, ["08-int8"]),
        ({"int4": {"method": "round_to_nearest"}}, {}, ["09-int4"]),
        ({"tie": {"method": "input"}}, {}, NAMES[4:]),
        ({"width": {"method": "magnitude"}}, {}, NAMES[3:]),
        ({"heads": {"kv_heads": 1, "num_attention_heads": 2}}, {}, NAMES[1:]),
        ({"depth": {"method": "random"}}, {}, NAMES),
        ({}, {"seed": 1}, NAMES),
        ({}, {"calibration": {"source": "other.jsonl", "samples": 2, "sequence_length": 32}}, NAMES),
        ({"int4": {"from": "width"}}, {}, ["09-int4"]),
    ],
)
def test_exactly_what_depends_on_a_change_is_redone(
    finished: Path, write: Write, changes: dict[str, dict[str, Any]], top: dict[str, Any], redone: list[str]
):
    write_text(finished.parent / "other.jsonl", "{} is told here, quite another text.")
    write(finished.parent, changes, **top)
    output, same = run_and_compare(finished)
    assert same == said(output, "finished before, reused") == [name for name in NAMES if name not in redone]
    assert said(output, "its options, or what it depends on, changed: done again") == redone
    assert said(output, "running") == redone


@pytest.mark.parametrize("changes", [{"width": {"method": "magnitude"}}, {"tie": {"method": "input"}}])
def test_redone_stages_are_what_a_new_run_makes(
    finished: Path, write: Write, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, dict[str, Any]]
):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), changes)
    for recipe in (elsewhere, write(finished.parent, changes)):
        run(recipe)
    assert digests(finished.parent / "out") == digests(elsewhere.parent / "out")


def test_another_source_redoes_everything(
    finished: Path, make_checkpoint: Callable[..., Path], write: Write, source: Path
):
    write(finished.parent, model={"source": str(make_checkpoint("glm", rms_norm_eps=1e-4))})
    output, same = run_and_compare(finished)
    assert same == []
    assert said(output, "running") == NAMES


def test_other_evaluation_settings_only_evaluate_again(finished: Path, write: Write):
    write(finished.parent, evaluation={"perplexity": {"samples": 1, "sequence_length": 32}})
    output, same = run_and_compare(finished)
    assert same == CHECKPOINTS
    assert said(output, "its options, or what it depends on, changed: done again") == ["07-evaluate"]
    assert said(output, "evaluating perplexity") == ["00-source", "06-refit"]
    assert not re.search("measure|quantize:|write:", output)
    row = json.loads((finished.parent / "out" / "metrics.json").read_text())["stages"][7]
    assert row["evaluations"]["perplexity"]["tokens"] == 31


def test_going_back_to_the_old_options_gives_the_old_bytes(finished: Path, write: Write, undisturbed: dict[str, str]):
    write(finished.parent, {"ffn": {"method": "magnitude"}})
    run(finished)
    assert digests(finished.parent / "out") != undisturbed
    write(finished.parent)
    output, same = run_and_compare(finished)
    assert "measure" not in output  # the statistics are those of the source
    assert same == NAMES[:2]
    assert digests(finished.parent / "out") == undisturbed


# Renamed and moved stages


def test_a_renamed_stage_is_moved(finished: Path, write: Write):
    write(finished.parent, {"int8": {"name": "eight"}, "ffn": {"name": "narrow"}})
    output = run(finished)
    renamed = ["01-depth", "02-heads", "03-narrow", *NAMES[3:7], "08-eight", "09-int4"]
    assert said(output, "finished before, reused") == renamed
    assert not re.search("running|evaluating|not in the recipe", output)
    assert [folder.name for folder in result_folders(finished.parent / "out")] == renamed
    assert json.loads((finished.parent / "out" / "metrics.json").read_text())["stages"][3]["name"] == "03-narrow"
    records = [json.loads((folder / "stage.json").read_text()) for folder in result_folders(finished.parent / "out")]
    assert [record["name"] for record in records] == renamed
    assert [record["parent"] for record in records] == ["00-source", *renamed[:6], "06-refit", "06-refit"]


def test_an_inserted_evaluation_moves_what_follows_and_redoes_nothing(finished: Path, write: Write):
    write(finished.parent, stages=[{"stage": "evaluate", "name": "first", "tasks": ["perplexity"]}, *STAGES])
    before = state(finished.parent / "out" / "06-refit")
    output = run(finished)
    assert len(said(output, "finished before, reused")) == len(NAMES)
    assert not re.search("running|evaluating", output)
    after = state(finished.parent / "out" / "07-refit")
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {"stage.json"}  # which names it and its parent
    made = {
        folder.name: json.loads((folder / "stage.json").read_text())["makes"]
        for folder in result_folders(finished.parent / "out")
    }
    assert [name for name, kind in made.items() if kind == "measurement"] == ["01-first", "08-evaluate"]
    metrics = json.loads((finished.parent / "out" / "metrics.json").read_text())["stages"]
    assert [row["name"] for row in metrics][6:9] == ["06-tie", "07-refit", "08-evaluate"]
    assert metrics[8]["perplexity"] is not None


def test_a_removed_branch_is_left_and_named(finished: Path, write: Write):
    write(finished.parent, stages=STAGES[:-1])
    output, same = run_and_compare(finished)
    assert same == NAMES
    assert said(output, r"not in the recipe \(any more\)") == ["09-int4"]


# --from, --until, --fresh


def test_from_does_a_stage_and_those_after_it_again(finished: Path, undisturbed: dict[str, str]):
    output, same = run_and_compare(finished, "--from", "width")
    assert same == said(output, "finished before, reused") == NAMES[:3]
    assert said(output, r"done again \(--from width\)") == said(output, "running") == NAMES[3:]
    assert digests(finished.parent / "out") == undisturbed


def test_until_stops_there_and_the_rest_can_follow(write: Write, tmp_path: Path, undisturbed: dict[str, str]):
    recipe = write(tmp_path)
    run(recipe, "--until", "ffn")
    assert [folder.name for folder in result_folders(tmp_path / "out")] == NAMES[:3]
    output = run(recipe)
    assert said(output, "finished before, reused") == NAMES[:3]
    assert said(output, "running") == NAMES[3:]
    assert digests(tmp_path / "out") == undisturbed


def test_from_and_until_together(finished: Path):
    metrics = finished.parent / "out" / "metrics.json"
    before = [row["name"] for row in json.loads(metrics.read_text())["stages"]]
    output, same = run_and_compare(finished, "--from", "heads", "--until", "ffn")
    assert said(output, "running") == NAMES[1:3]
    assert same == [name for name in NAMES if name not in NAMES[1:3]]
    assert [row["name"] for row in json.loads(metrics.read_text())["stages"]] == before  # the later ones still count


def test_fresh_deletes_and_does_everything(finished: Path, undisturbed: dict[str, str]):
    (finished.parent / "out" / "notes.txt").write_text("the user's own")
    output, same = run_and_compare(finished, "--fresh")
    assert same == []
    assert said(output, "running") == NAMES
    assert "measure" in output
    assert said(output, "evaluating perplexity") == ["00-source", "06-refit"]
    assert digests(finished.parent / "out") == undisturbed
    assert (finished.parent / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "ffn"], "--from ffn: 01-depth is not finished yet"),
        (["--until", "wide"], "--until: no stage 'wide' in the recipe; there are depth, heads"),
        (["--from", "ffn", "--until", "depth"], "--from ffn comes after --until depth"),
        (["--from", "ffn", "--fresh"], "--fresh starts from the first stage"),
    ],
)
def test_a_range_that_cannot_be_is_refused(write: Write, tmp_path: Path, arguments: list[str], message: str):
    result = invoke("run", write(tmp_path), "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert stage_folders(tmp_path / "out") == []


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model-00001-of-00001.safetensors", truncate),
        ("model.safetensors.index.json", Path.unlink),
        ("tokenizer.json", Path.unlink),
        ("lineage.json", truncate),
        ("stage.json", truncate),
        ("stage.json", Path.unlink),
    ],
)
def test_a_damaged_stage_is_redone(
    finished: Path, undisturbed: dict[str, str], file: str, damage: Callable[[Path], None]
):
    damage(finished.parent / "out" / "02-heads" / file)
    output, same = run_and_compare(finished)
    assert said(output, "missing or damaged files: done again") == said(output, "running") == ["02-heads"]
    assert same == [name for name in NAMES if name != "02-heads"]
    assert digests(finished.parent / "out") == undisturbed


def test_a_lost_manifest_is_no_reason_to_touch_the_folder(finished: Path):
    (finished.parent / "out" / "manifest.json").unlink()
    result = invoke("run", finished, "--output", finished.parent / "out")
    assert result.exit_code == 2
    assert "not empty, and not the output of a run" in " ".join(result.output.split())


# Shards


def test_what_a_stage_leaves_as_it_is_takes_no_room_again(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("autoglm_compress.checkpoint.writer.SHARD_BYTES", 1)  # a shard for each layer
    run(write(tmp_path), "--until", "refit")
    width, tied, refitted = (tmp_path / "out" / name for name in NAMES[3:6])
    files = {
        folder: {file.stat().st_ino for file in folder.glob("*.safetensors")} for folder in (width, tied, refitted)
    }
    assert len(files[width] & files[tied]) == 3  # the layers
    assert len(files[tied] & files[refitted]) == 1  # the embedding
    elsewhere = write(tmp_path / "elsewhere")
    monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    run(elsewhere, "--until", "refit")
    assert digests(tmp_path / "out") == digests(tmp_path / "elsewhere" / "out")


def refuse_links(*_: object) -> None:
    raise OSError("Operation not permitted")


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("link", [None, refuse_links, stop], ids=["", "no hard links", "stopped and resumed"])
def test_large_checkpoints_come_in_shards_that_load(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Callable[..., None] | None
):
    """With a limit of 40 kB a checkpoint becomes several shards, some of one unit and some of more."""
    monkeypatch.setattr("autoglm_compress.checkpoint.writer.SHARD_BYTES", 40_000)
    recipe = write(tmp_path)
    with monkeypatch.context() as patches:
        if link:
            patches.setattr(Path, "hardlink_to", link)
        finished = invoke("run", recipe, "--output", tmp_path / "out", "--device", "cpu").exit_code == 0
    assert finished == (link is not stop)
    if not finished:
        run(recipe)
    for folder in stage_folders(tmp_path / "out"):
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
        assert len(shards) > 1
        assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        assert load(folder, "auto")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
