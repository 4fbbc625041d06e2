"""The stage `attention`, what later stages make of its file, and `evaluate --attention`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.fitting.tokens_read import fewest
from support.command_line import assert_says, refusal
from support.running import invoke, load, result_folders, run, same_tensors, write_recipe

MakeCheckpoint = Callable[..., Path]
ROWS = {"source": "python-docs", "samples": 4, "sequence_length": 64}
SPARSE = {"stage": "attention", "top_k": 4, "window": 2, "max_divergence": 0.3}
QUANTIZE = {"stage": "quantize", "bits": 8, "group_size": 32, "method": "round_to_nearest"}


@pytest.fixture(scope="module")
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("glm")


@pytest.fixture(scope="module")
def chain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """What a run said, and its folders: cut, sparse, quantized, sparse again."""
    folder = tmp_path_factory.mktemp("chain")
    stages = [{"stage": "depth", "layers": [0, 1, 3]}, SPARSE, QUANTIZE, SPARSE | {"name": "again"}]
    said = run(write_recipe(folder, source, stages, calibration=ROWS))
    return said, result_folders(folder / "out")


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


def test_the_choice_stands_beside_the_same_weights(chain: tuple[str, list[Path]]) -> None:
    cut, sparse = chain[1][:2]
    chosen = json.loads((sparse / "attention.json").read_text())

    assert len(chosen["top_k"]) == 3
    assert set(chosen["top_k"]) <= {4, 8, 16, 32, None}
    assert (chosen["window"], chosen["kv_bits"], chosen["dense_below"]) == (2, 8, 2048)
    assert 0 < chosen["measured"]["kl_divergence"] <= 0.3
    assert _record(sparse)["decisions"] == {"top_k": chosen["top_k"], "agreement": chosen["measured"]}
    weights = [file.name for file in cut.glob("*.safetensors")]
    assert weights
    assert all((sparse / name).samefile(cut / name) for name in weights)
    assert load(sparse).config.num_hidden_layers == 3


def test_a_stage_that_changes_weights_drops_the_file_and_says_so(chain: tuple[str, list[Path]]) -> None:
    said, (_, _, quantized, again) = chain

    assert not (quantized / "attention.json").exists()
    assert_says(" ".join(_record(quantized)["warnings"]), "attention.json", "put attention last")
    assert_says(said, "attention.json of attention is for its weights alone")
    assert (again / "attention.json").exists()
    assert same_tensors(again, quantized)
    assert _record(again)["warnings"] == []


def _evaluated(checkpoint: Path, file: Path, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    output = tmp_path / "results.json"
    given = ("--tasks", "perplexity", "--samples", 2, "--sequence-length", 64, "--output", output, "--device", "cpu")
    result = invoke("evaluate", checkpoint, "--attention", file, *given, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text()) | {"said": " ".join(result.output.split())}


def test_evaluate_measures_what_the_file_says(chain: tuple[str, list[Path]], tmp_path: Path) -> None:
    cut, sparse = chain[1][:2]
    written = json.loads((sparse / "attention.json").read_text())

    def measured(**changes: object) -> dict[str, Any]:
        (tmp_path / "attention.json").write_text(json.dumps(written | changes))
        return _evaluated(cut, tmp_path / "attention.json", tmp_path, "--against", cut)

    few = measured(top_k=[4, 4, 4], dense_below=0)
    rounded = measured(top_k=[None, None, None])
    everything = measured(top_k=[None, None, None], kv_bits=16)
    divergences = [each["tasks"]["agreement"]["result"]["divergence"] for each in (few, rounded, everything)]

    assert divergences[0] > 3 * divergences[1] > 0
    assert divergences[2] < 1e-9
    assert few["tasks"]["perplexity"]["result"]["value"] != everything["tasks"]["perplexity"]["result"]["value"]
    assert few["checkpoint"]["attention"]["top_k"] == [4, 4, 4]
    assert "dense_below is 2048: rows of 64 tokens are read whole" in rounded["said"]
    assert "dense_below" not in few["said"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not JSON"]),
        ('{"window": 3}', ["top_k", "Field required"]),
        ('{"top_k": [4, 4], "window": 0}', ["window", "found 0"]),
        ('{"top_k": [4, 4, 4]}', ["3 entries", "4 layers"]),
    ],
)
def test_a_file_that_is_not_this_model_s_is_refused(
    content: str, words: list[str], source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "attention.json"
    file.write_text(content)

    message = refusal("evaluate", source, "--tasks", "perplexity", "--output", tmp_path / "x", "--attention", file)
    assert_says(message, file, *words, "Give the attention.json")


def test_rows_that_are_read_whole_are_refused(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, source, [SPARSE | {"top_k": 61}], calibration=ROWS)

    assert_says(refusal("plan", recipe), "stages.1.top_k", "rows of 64 tokens", "calibration.sequence_length")


def test_a_limit_that_the_cache_alone_breaks_is_refused(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, source, [SPARSE | {"max_divergence": 1e-9}], calibration=ROWS)

    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "cache of 8 bits", "kv_bits: 16")


THREE = st.lists(st.integers(1, 99), min_size=3, max_size=3)


@given(changes=st.lists(THREE, min_size=1, max_size=6), most=st.integers(0, 300))
@settings(deadline=None)
def test_the_fewest_tokens_within_the_limit(changes: list[list[int]], most: int) -> None:
    by_layer = [dict(zip((4, 8, 16), sorted(layer, reverse=True), strict=True)) for layer in changes]

    def measure(choice: tuple[int | None, ...]) -> float:
        pairs = zip(by_layer, choice, strict=True)
        return sum(0 if top_k is None else layer[top_k] for layer, top_k in pairs)

    best, found = fewest(by_layer, most, measure)

    def within(threshold: int) -> tuple[int | None, ...]:
        return tuple(min((k for k, change in layer.items() if change <= threshold), default=None) for layer in by_layer)

    choices = [within(threshold) for threshold in range(100)]
    assert best == max((choice for choice in choices if measure(choice) <= most), key=choices.index)
    assert found == measure(best) <= most
