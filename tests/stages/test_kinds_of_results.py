"""A checkpoint, an artifact, a measurement: other packages' stages make each of them, and `keep` and resuming hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from autoglm_compress.architecture import ModelShape
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.stages import Makes, Needs, Stage, StageContext
from support.command_line import plan
from support.plug_ins import AddStage
from support.running import digests, invoke, result_folders, run, write_recipe

SIZE = 5000
RAN: list[str] = []


class Blob(Stage):
    """Writes the sizes of the checkpoint's tensors into files of its own, one in a subfolder."""

    stage: Literal["blob"]
    fails: bool = False
    makes = Makes.ARTIFACT
    accepting = frozenset({"fails"})

    def plan(self, shape: ModelShape) -> ModelShape:
        return shape

    def needs(self, shape: ModelShape, source: ModelShape, calibration: CalibrationOptions) -> Needs:
        return Needs(artifact=SIZE)

    def run(self, context: StageContext) -> None:
        RAN.append("blob")
        (context.result / "parts").mkdir(exist_ok=True)
        sizes = {name: context.source.read(name).numel() for name in sorted(context.source.infos)}
        (context.result / "sizes.json").write_text(json.dumps(sizes))
        if self.fails:
            raise KeyboardInterrupt
        (context.result / "parts" / "blob").write_bytes(bytes(SIZE))
        context.decisions = {"tensors": len(sizes)}


class Count(Stage):
    """Counts the checkpoint's tensors."""

    stage: Literal["count"]
    makes = Makes.MEASUREMENT
    reads_quantized = True

    def plan(self, shape: ModelShape) -> ModelShape:
        return shape

    def run(self, context: StageContext) -> None:
        RAN.append("count")
        context.decisions = {"tensors": len(context.source.infos)}


STAGES: list[dict[str, Any]] = [
    {"stage": "depth", "layers": [0, 1, 2]},
    {"stage": "blob"},
    {"stage": "ffn", "intermediate_size": 64, "from": "depth", "method": "magnitude"},
    {"stage": "count", "from": "depth"},
]
NAMES = ["01-depth", "02-blob", "03-ffn", "04-count"]


@pytest.fixture(autouse=True)
def plug_ins(add_stage: AddStage) -> None:
    add_stage("blob", Blob)
    add_stage("count", Count)
    RAN.clear()


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("glm")


def write(folder: Path, source: Path, stages: list[dict[str, Any]] = STAGES, **changes: Any) -> Path:
    evaluation = {"every_stage": [], "perplexity": {"samples": 2, "sequence_length": 32}}
    return write_recipe(folder, source, stages, evaluation=evaluation, **changes)


def record_of(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / name / "stage.json").read_text())


def test_each_kind_has_a_folder_that_says_what_is_in_it(source: Path, tmp_path: Path):
    run(write(tmp_path, source))
    assert [folder.name for folder in result_folders(tmp_path / "out")] == NAMES
    records = [record_of(tmp_path / "out", name) for name in NAMES]
    assert [record["makes"] for record in records] == ["checkpoint", "artifact", "checkpoint", "measurement"]
    assert {name: file["bytes"] for name, file in records[1]["files"].items()}["parts/blob"] == SIZE
    assert records[3]["files"] == {}
    assert records[1]["decisions"] == records[3]["decisions"]
    assert [record["parent"] for record in records] == ["00-source", "01-depth", "01-depth", "01-depth"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/metrics.json").read_text())["stages"]}
    assert rows["02-blob"]["bytes"] == sum(file["bytes"] for file in records[1]["files"].values())
    assert rows["04-count"]["bytes"] == rows["01-depth"]["bytes"]
    assert rows["02-blob"]["shape"] == rows["01-depth"]["shape"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert all(stage["finished"] for stage in manifest["stages"])
    assert invoke("report", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("keep", ["all", "last", "none"])
def test_what_was_made_is_not_made_again(source: Path, tmp_path: Path, keep: str):
    """Under `keep: none` the checkpoint is gone that the artifact and the measurement were made from."""
    recipe = write(tmp_path, source, keep=keep)
    run(recipe)
    assert (list((tmp_path / "out/01-depth").glob("*.safetensors")) == []) == (keep == "none")
    before, ran = digests(tmp_path / "out"), [*RAN]
    output = run(recipe)
    assert RAN == ran == ["blob", "count"]
    assert output.count("finished before, reused") == len(NAMES)
    assert "running" not in output
    assert "done again" not in output
    assert digests(tmp_path / "out") == before


def test_a_damaged_artifact_is_made_again_from_a_checkpoint_that_was_not_kept(source: Path, tmp_path: Path):
    recipe = write(tmp_path, source, keep="none")
    run(recipe)
    blob = tmp_path / "out/02-blob/parts/blob"
    blob.write_bytes(b"")
    output = run(recipe)
    assert "02-blob: missing or damaged files: done again" in output
    assert "01-depth: finished before, but not kept: done again for those that need it" in output
    assert blob.stat().st_size == SIZE
    assert RAN == ["blob", "count", "blob"]
    assert list((tmp_path / "out/01-depth").glob("*.safetensors")) == []


def test_an_artifact_appears_whole_or_not_at_all(source: Path, tmp_path: Path):
    failing = [STAGES[0], STAGES[1] | {"fails": True}, *STAGES[2:]]
    result = invoke("run", write(tmp_path, source, failing), "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 130
    assert [folder.name for folder in result_folders(tmp_path / "out")] == ["01-depth"]
    output = run(write(tmp_path, source))
    assert "02-blob: going on where an earlier run stopped" in output
    assert record_of(tmp_path / "out", "02-blob")["files"].keys() == {"sizes.json", "parts/blob"}


def test_from_does_a_measurement_again(source: Path, tmp_path: Path):
    recipe = write(tmp_path, source)
    run(recipe)
    output = run(recipe, "--from", "count")
    assert "04-count: done again (--from count)" in output
    assert RAN == ["blob", "count", "count"]


def test_the_disk_of_an_artifact_is_planned(source: Path, tmp_path: Path):
    planned = {entry["name"]: entry["disk_bytes"] for entry in plan(write(tmp_path, source))["checkpoints"]}
    assert planned["02-blob"] == SIZE
    assert planned["04-count"] == 0


def test_a_table_that_cannot_be_made_costs_the_table_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Count, "linears", lambda *_: [][0])
    output = run(write(tmp_path, source))
    assert "warning: count: no table of linears: IndexError" in output
    assert record_of(tmp_path / "out", "04-count")["linears"] == []


def test_nothing_takes_an_artifact(source: Path, tmp_path: Path):
    stages = [*STAGES, {"stage": "tie", "from": "blob", "method": "average"}]
    result = invoke("plan", write(tmp_path, source, stages))
    assert result.exit_code == 2
    assert "no stage before this one makes a checkpoint 'blob'" in " ".join(result.output.split())
