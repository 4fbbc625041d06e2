"""The files of runs and evaluations: what is written is read again, and what is damaged is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm_compress.errors import UserError
from autoglm_compress.records.evaluation import EvaluationRecord, read_evaluation
from autoglm_compress.records.files import Record, found, read_json, read_record
from autoglm_compress.records.manifest import Manifest, read_manifest
from autoglm_compress.records.metrics import Metrics, read_metrics
from autoglm_compress.records.stage import StageRecord, read_stage
from support.command_line import assert_says
from support.questions import results, save

SCHEMAS = (StageRecord, Metrics, Manifest, EvaluationRecord)
FILE = {"bytes": 3, "sha256": "ab"}
SPENT = {"seconds": 1.5, "processes": 1, "cpu_seconds": 1.25, "peak_rss_bytes": 7}
SHAPE = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "quantization": None}
STAGE = {
    "name": "01-depth",
    "key": "k",
    "options": {"stage": "depth", "from": None},
    "parent": "00-source",
    "shape_before": SHAPE | {"num_hidden_layers": 3},
    "shape": SHAPE,
    "decisions": {"kept_layers": [0, 2], "scores": [0.5, math.inf]},
    "warnings": ["mind the gap"],
    "files": {"config.json": FILE},
    "versions": {"torch": "2"},
    **SPENT,
}
MMLU = {"accuracy": 0.5, "stderr": None, "questions": 2, "subjects": {"law": {"accuracy": 0.5, "correct": "10"}}}
ROW = {"name": "01-depth", "stage": "depth", "shape": SHAPE, "bytes": 3, **SPENT, "evaluations": {"mmlu": MMLU}}
METRICS = {"recipe": "r", "stages": [{"name": "source", "stage": "source"}, ROW]}
MANIFEST = {
    "recipe": {"name": "r"},
    "source": {"folder": "s", "key": "k", "files": {"config.json": FILE | {"mtime_ns": 5}}},
    "others": {"teacher": {"folder": "t", "files": {}}},
    "seed": 0,
    "stages": [{"name": "01-depth", "key": "k", "finished": True, "files": {"config.json": FILE}, "dropped": True}],
}
OF_A_RUN = {"schema_version": 1, "key": "k", "tasks": {"piqa": {"settings": "h", "result": {"acc": 0.5}}}}
OF_EVALUATE = {
    "schema_version": 1,
    "checkpoint": {"folder": "f", "files": {"config.json": FILE}},
    "tasks": {"mmlu": {"settings": {"limit": None}, "result": MMLU}},
    "device": "cpu",
    "resources": SPENT,
}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        (StageRecord, STAGE),
        (StageRecord, STAGE | {"makes": "artifact", "left_out": ["lm_head.bias"], "linears": [{"layer": 0}]}),
        (Metrics, METRICS),
        (Manifest, MANIFEST),
        (EvaluationRecord, OF_A_RUN),
        (EvaluationRecord, OF_EVALUATE),
    ],
)
def test_a_file_that_is_read_and_written_has_the_same_content(tmp_path: Path, schema: type[Record], data: Any):
    file = save(tmp_path / "a.json", data)
    record = read_record(schema, file)
    record.write(tmp_path / "b.json")
    assert read_json(tmp_path / "b.json") == data
    assert read_record(schema, tmp_path / "b.json") == record


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    decisions=st.dictionaries(st.text(), plain, max_size=4),
    warnings=st.lists(st.text()),
    sizes=st.dictionaries(st.text(), st.integers(min_value=0), max_size=3),
    seconds=st.none() | st.floats(min_value=0, allow_nan=False),
    unknown=plain,
)
def test_every_stage_record_comes_back(
    tmp_path: Path,
    decisions: dict[str, Any],
    warnings: list[str],
    sizes: dict[str, int],
    seconds: float | None,
    unknown: Any,
):
    files = {name: {"bytes": size, "sha256": "ab"} for name, size in sizes.items()}
    record = StageRecord(
        name="01-x", decisions=decisions, warnings=warnings, files=files, seconds=seconds, of_a_later_version=unknown
    )
    record.write(tmp_path / "stage.json")
    assert read_stage(tmp_path / "stage.json") == record


def test_defaults_stand_for_what_older_versions_did_not_write(tmp_path: Path):
    assert read_manifest(save(tmp_path / "manifest.json", {})).stages == []
    stage = read_stage(save(tmp_path / "stage.json", {"key": "k"}))
    assert (stage.makes, stage.dropped, stage.left_out, stage.decisions) == ("checkpoint", False, [], {})
    assert stage.as_data() == {"key": "k"}


def test_a_row_has_the_scores_of_mmlu_without_writing_them_twice(tmp_path: Path):
    metrics = read_metrics(save(tmp_path / "metrics.json", METRICS))
    source, row = metrics.stages
    assert source.mmlu is None
    assert row.mmlu.subjects["law"].correct == "10"
    assert row.shape.kv_cache_bytes(10) == 2 * 2 * 16 * 2 * 2 * 10
    assert metrics.as_data() == METRICS


@pytest.mark.parametrize(
    ("schema", "data", "words"),
    [
        (StageRecord, [], ["all of it: given '[]'"]),
        (StageRecord, STAGE | {"makes": "cake"}, ["makes: given 'cake'", "'checkpoint', 'artifact' or 'measurement'"]),
        (StageRecord, STAGE | {"files": {"a": {"bytes": 1}}}, ["files.a.sha256: absent: field required"]),
        (Metrics, {"recipe": "r", "stages": []}, ["stages: given '[]'", "at least 1"]),
        (Manifest, {"stages": [{"name": "a", "key": "k"}]}, ["stages.0.finished: absent"]),
        (Manifest, {"threads": "many"}, ["threads: given 'many': must be a valid integer"]),
    ],
)
def test_the_first_wrong_field_is_named(tmp_path: Path, schema: type[Record], data: Any, words: list[str]):
    file = save(tmp_path / "record.json", data)
    with pytest.raises(UserError) as caught:
        read_record(schema, file)
    assert_says(str(caught.value), file, "Run the recipe again", *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"tasks": 3}', b"[]"])
def test_a_damaged_evaluation_is_as_good_as_none(tmp_path: Path, content: bytes):
    file = tmp_path / "evaluation.json"
    file.write_bytes(content)
    assert found(EvaluationRecord, file) is None
    with pytest.raises(UserError, match=r"evaluation\.json: "):
        read_evaluation(file)


def test_results_to_compare_must_be_of_this_version(tmp_path: Path):
    assert found(EvaluationRecord, tmp_path / "none.json") is None
    whole = save(tmp_path / "whole.json", results({"law": "10"}))
    assert read_evaluation(whole).as_data() == json.loads(whole.read_text())
    other = save(tmp_path / "other.json", results({"law": "10"}) | {"schema_version": 2})
    with pytest.raises(UserError, match="schema_version: given 2"):
        read_evaluation(other)
    assert found(EvaluationRecord, other).schema_version == 2  # a run compares keys, which have the version in them
