"""Whatever decides in a run is judged on text that no stage of it was fitted to, and a stage without effect says so."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.divided_rows import undivided
from autoglm_compress.calibration.python_docs import split_of_text
from autoglm_compress.calibration.run_text import CalibrationText
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.evaluation.run_results import Evaluations
from autoglm_compress.fitting.descent import Descent
from autoglm_compress.fitting.fitting_rows import FittingRows
from autoglm_compress.healing import setup
from autoglm_compress.progress import Progress
from autoglm_compress.stages import quantize, tie
from support.command_line import assert_says, plan
from support.running import CALIBRATION, compress, run, tensors_of, write_recipe

MakeCheckpoint = Callable[..., Path]
Seen = dict[tuple[str, str], set[int]]
"""By stage and role the numbers of the documents in its rows."""

REFIT = {"stage": "refit", "layer_passes": 1, "logit_passes": 1}
HEAL = {"stage": "heal", "tokens": 1024, "batch_size": 4, "checks": 1, "learning_rate": 1e-3}
FEW_BITS = {"stage": "quantize", "bits": "auto", "budget": {"average_bits": 5}, "group_size": 32, "max_divergence": 9}
LONGER = {"heal": {"tokens": 2048}, "refit": {}}
CHAIN = [
    {"stage": "depth", "num_hidden_layers": 3},
    REFIT,
    {"stage": "tie", "passes": 1},
    HEAL | {"random_tokens": 0.25},
    HEAL | {"name": "written", "data": "teacher_samples", "sequence_length": 64},
    FEW_BITS,
    {"stage": "evaluate", "tasks": ["perplexity"]},
]


def write_documents(path: Path, numbers: Iterable[int]) -> Path:
    rows = ({"text": f"#{n}#, #{n}#."} for n in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Seen:
    """Watches every place where rows of text go into a stage, or into an evaluation."""
    found: Seen = defaultdict(set)

    def watch(owner: Any, name: str, look: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            look(result, *args, **options)
            return result

        monkeypatch.setattr(owner, name, watched)

    def add(stage: str, role: str, *rows: torch.Tensor) -> None:
        for some in rows:
            for row in some.tolist():
                found[stage, role] |= {int(number) for number in re.findall(r"#(\d+)#", tokenizer.decode(row))}

    def add_divided(stage: str, batches: list[torch.Tensor], decide: list[torch.Tensor]) -> None:
        for batch, decides in zip(batches, decide, strict=True):
            add(stage, "fitted", batch[~decides])
            add(stage, "judged", batch[decides])

    def add_training(result: Any, *_: Any) -> None:
        names = iter(("written", "heal"))
        stage = next(name for name in names if name == "heal" or result.rows.shape[1] == 64)
        judged = torch.isin(torch.arange(len(result.rows)), result.held_out)
        add(stage, "judged", result.rows[judged])
        add(stage, "fitted", result.rows[~judged])

    def add_openings(_: Any, model: Any, shape: Any, parts: Any, *others: Any) -> None:
        for part in parts:
            add("openings", "fitted", part.rows)
            add("openings", "judged", part.deciding)

    watch(FittingRows, "__init__", lambda _, self, rows, __: add_divided("refit", rows.batches, rows.deciding))
    watch(tie, "record", lambda _, __, rows, *___: add_divided("tie", rows.batches, rows.deciding))
    watch(setup, "training_rows", add_training)
    watch(setup, "continued", add_openings)
    watch(quantize, "measure_agreement", lambda _, __, ___, rows, *____: add("quantize", "judged", *rows))
    watch(quantize, "walk_and_quantize", lambda _, __, batches, **___: add("quantize", "fitted", *batches()))
    watch(quantize, "choose_bits", lambda _, __, ___, batches, *____: add("quantize", "fitted", *batches))
    watch(Evaluations, "_rows", lambda rows, *_: add("evaluate", "judged", rows))
    return found


def test_what_decides_never_meets_what_is_fitted_to(seen: Seen, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    one = write_documents(tmp_path / "one.jsonl", range(1000, 2000))
    two = write_documents(tmp_path / "two.jsonl", range(2000, 2600))
    calibration = {"source": {str(one): 2, str(two): 1}, "samples": 24, "sequence_length": 32}
    evaluation = {"every_stage": [], "perplexity": {"samples": 4, "sequence_length": 32}}
    recipe = write_recipe(
        tmp_path,
        make_checkpoint("llama", num_hidden_layers=4),
        CHAIN,
        calibration=calibration,
        evaluation=evaluation,
    )
    assert not [warning for warning in plan(recipe)["warnings"] if "decid" in warning]
    run(recipe)
    fitted = {stage: numbers for (stage, role), numbers in seen.items() if role == "fitted"}
    judged = {stage: numbers for (stage, role), numbers in seen.items() if role == "judged"}
    assert fitted.keys() == {"refit", "tie", "heal", "openings", "written", "quantize"}
    assert judged.keys() == {*fitted, "evaluate"}
    assert all(len(numbers) > 10 for numbers in fitted.values())
    assert all(judged.values())
    for stage, numbers in judged.items():
        for other, seen_there in fitted.items():
            assert not numbers & seen_there, (stage, other)
    # Every source has its say, but for perplexity, which is measured on one.
    for stage in judged.keys() - {"evaluate"}:
        assert {number // 2000 for number in judged[stage]} == {0, 1}, stage


def text_of(tokenizer: PreTrainedTokenizerFast, sources: dict[str, Path], longest: int = 0, **options: Any) -> Any:
    progress = Progress(Console(quiet=True))
    shape = SimpleNamespace(vocab_size=len(tokenizer))
    model = SimpleNamespace(tokenizer=lambda: tokenizer, shape=shape, folder=Path(), family=SimpleNamespace(kept={}))
    return CalibrationText(
        CalibrationOptions(source=dict.fromkeys(sources, 1), **options), sources, model, progress, longest
    )


@given(samples=st.integers(2, 60), sources=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_as_many_rows_are_fitted_to_as_before(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, samples: int, sources: int
):
    """Of so many samples an eighth decided, and at least one; now as many decide, and as many do not."""
    folder, samples = tmp_path_factory.mktemp("sources"), max(samples, sources)
    files = {name: write_documents(folder / f"{name}.jsonl", range(1000, 2000)) for name in "abc"[:sources]}
    text = text_of(tokenizer, files, samples=samples, sequence_length=16)
    now, before = text.divided(), undivided(text.batches)
    for rows in (now, before):
        assert sum(map(len, rows.batches)) == samples
        assert sum(int(decides.sum()) for decides in rows.deciding) == max(1, samples // 8)
    fitted = [batch[~decides] for batch, decides in zip(now.batches, now.deciding, strict=True)]
    assert torch.equal(torch.cat(fitted), torch.cat(text.batches)[: samples - max(1, samples // 8)])


def test_too_little_text_is_not_divided(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    files = {"few": write_documents(tmp_path / "few.jsonl", range(1000, 1030))}
    assert text_of(tokenizer, files, samples=4, sequence_length=8).divided_sources == ["few"]
    # A stage asks for longer rows than the documents that decide can fill: so no stage keeps them apart.
    whole = text_of(tokenizer, files, longest=128, samples=4, sequence_length=8)
    assert whole.divided_sources == []
    assert torch.equal(torch.cat(whole.divided().batches), torch.cat(whole.batches))
    [part] = whole.training(64, 8)
    assert len(part.deciding) == 1
    assert len(part.rows) == part.wanted == 8
    assert torch.equal(
        torch.cat([part.rows[:8], part.deciding]).sort(0).values[:, 0],
        whole._rows("few", "calibration", 9)[:, 0].sort().values,
    )


def test_a_source_without_a_say_is_trained_on_all_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    files = {
        "many": write_documents(tmp_path / "many.jsonl", range(1000, 2000)),
        "few": write_documents(tmp_path / "few.jsonl", range(3003, 3009)),
    }
    text = text_of(tokenizer, files, samples=16, sequence_length=16)
    assert text.divided_sources == ["many"]
    many, few = text.training(16 * 16, None)
    assert len(few.deciding) == 0 < len(few.rows)
    assert len(many.deciding) == 1
    rows = text.divided()
    judged = torch.cat([batch[decides] for batch, decides in zip(rows.batches, rows.deciding, strict=True)])
    assert all(int(number) < 3000 for number in re.findall(r"#(\d+)#", tokenizer.decode(judged.flatten())))


@pytest.mark.parametrize("stage", [REFIT, {"stage": "tie", "passes": 1}, HEAL], ids=lambda stage: stage["stage"])
@pytest.mark.parametrize("numbers", [range(1000, 1400), range(1000, 1004)], ids=["enough", "too little"])
def test_too_little_to_decide_by_is_said(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stage: dict[str, Any], numbers: range
):
    write_documents(tmp_path / "text.jsonl", numbers)
    calibration = {"source": "text.jsonl", "samples": 8, "sequence_length": 8}
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [stage], calibration=calibration)
    warnings = [warning for warning in plan(recipe)["warnings"] if "decid" in warning]
    if len(numbers) > 100:
        assert warnings == []
        return
    assert_says(warnings[0], "text.jsonl: too little text to keep documents for deciding about fits", "Give more text")
    assert warnings[0] in run(recipe)


def test_one_source_of_two_with_too_little_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    sources = {
        str(write_documents(tmp_path / "many.jsonl", range(1000, 1400))): 1,
        str(write_documents(tmp_path / "few.jsonl", range(1000, 1004))): 1,
    }
    calibration = {"source": sources, "samples": 8, "sequence_length": 8}
    found = plan(write_recipe(tmp_path, make_checkpoint("llama"), [REFIT], calibration=calibration))["warnings"]
    [warning] = [warning for warning in found if "decid" in warning]
    assert_says(warning, "few.jsonl: too little text", "the other sources alone decide")
    assert "many.jsonl" not in warning


# Stages without effect


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (HEAL | {"learning_rate": 1e-12}, "no check was better than the start"),
        (REFIT | {"logit_passes": 0}, "no fit was better"),
    ],
    ids=["heal", "refit"],
)
def test_a_stage_that_ends_where_it_began_says_so(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stage: dict[str, Any], why: str
):
    """A model that lost nothing is its own teacher: nothing is to be gained."""
    source = make_checkpoint("llama")
    recipe = write_recipe(tmp_path, source, [stage])
    said = run(recipe)
    made = tmp_path / "out" / f"01-{stage['stage']}"
    record = json.loads((made / "stage.json").read_text())
    before, after = tensors_of(source), tensors_of(made)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert why in record["decisions"]["unchanged"]
    [warning] = [warning for warning in record["warnings"] if why in warning]
    assert_says(warning, "the weights are what they were before this stage")
    assert f"warning: {made.name}: {warning}" in said
    assert warning in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_ends_that_training_did_not_help_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Descent, "improved", property(lambda _: False))
    said = run(write_recipe(tmp_path, make_checkpoint("llama", num_hidden_layers=4), [{"stage": "tie", "passes": 1}]))
    assert "warning: 01-tie: training made the ends no better on rows that decide" in said


@pytest.mark.parametrize("stage", [REFIT, HEAL], ids=["refit", "heal"])
def test_a_stage_that_helps_does_not(make_checkpoint: MakeCheckpoint, tmp_path: Path, stage: dict[str, Any]):
    cut = {"stage": "depth", "num_hidden_layers": 2}
    made = compress(tmp_path, make_checkpoint("llama", num_hidden_layers=4), cut, stage | LONGER[stage["stage"]])
    record = json.loads((made / "stage.json").read_text())
    assert "unchanged" not in record["decisions"]
    assert not [warning for warning in record["warnings"] if "what they were" in warning]


def test_documents_of_a_dataset_are_divided_as_those_of_sources(
    seen: Seen, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    """Text that is in both is fitted to in both, or decides in both."""
    (tmp_path / "data").mkdir()
    text = write_documents(tmp_path / "data" / "train.jsonl", range(1000, 2000))
    calibration = CALIBRATION | {"source": str(text), "samples": 16}
    data = HEAL | {"data": {"dataset": str(tmp_path / "data")}, "sequence_length": 32}
    compress(
        tmp_path / "run",
        make_checkpoint("llama"),
        {"stage": "depth", "layers": [0]},
        REFIT,
        data,
        calibration=calibration,
    )
    for stage in ("refit", "heal"):
        assert seen[stage, "judged"]
        for other in ("refit", "heal"):
            assert not seen[stage, "judged"] & seen[other, "fitted"]
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    held_out = {int(row.split("#")[1]) for row in rows if split_of_text(row) == "held-out"}
    assert held_out
    assert not held_out & (seen["heal", "fitted"] | seen["heal", "judged"])
