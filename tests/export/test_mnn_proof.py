"""The proof refuses files for MNN that are wrong, and nothing of them is kept."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_compress.export import engine_process, mnn_format
from support.command_line import assert_says, refusal
from support.engines import Forked
from support.exporting import export, quantize, recipe_of, run_stages, stage_folder

torch.set_num_threads(1)
Make = Callable[..., Path]
INSIDE = "autoglm_compress.export."
MUTANTS = {
    "swapped nibbles": ("mnn_weights:packed_rows", "swapped_nibbles", "int4"),
    "scales of the next group": ("mnn_weights:alpha", "scales_of_the_next_group", "int4"),
    "zero points of the next group": ("mnn_weights:alpha", "zeros_of_the_next_group", "awq"),
    "q and k in the checkpoint's order": ("mnn_builder:row_order", "order_of_the_checkpoint", "int4"),
    "frequencies 5 % too high": ("mnn_builder:whole_heads", "frequencies_too_high", "int4"),
    "up in the place of gate": ("mnn_graph:FeedForward.forward", "up_before_gate", "int4"),
    "no norms before adding": ("mnn_graph:Layer.forward", "norms_left_out", "int4"),
}


@pytest.fixture(scope="module")
def quantized(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of both kinds."""
    folder = tmp_path_factory.mktemp("run")
    run_stages(folder, make_checkpoint("glm4"), quantize("int4"), quantize("awq"))
    return folder / "out"


def refused(checkpoint: Path, folder: Path) -> str:
    """What is said of an export, of which nothing is left."""
    arguments = ("export", checkpoint, "--format", "mnn", "--output", folder / "made", "--device", "cpu")
    message = " ".join(refusal(*arguments).split())
    assert list(folder.rglob("llm.mnn*")) == []
    assert not (folder / "made").exists()
    return message


@pytest.mark.parametrize("mutant", MUTANTS)
def test_files_that_are_wrong_are_refused_and_not_published(
    mutant: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replaced, wrong, kind = MUTANTS[mutant]
    mutants = {INSIDE + replaced: f"support.mnn_mutants:{wrong}"}
    monkeypatch.setattr(engine_process, "subprocess", Forked(mutants))
    message = refused(stage_folder(quantized, kind), tmp_path)
    assert_says(message, "llm.mnn: MNN does not predict", "KL divergence", "not kept")


def after_predicting(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let something happen between writing and the proof."""
    predict = mnn_format.MnnFormat.predict

    def changed(self: Any, job: Any, rows: Any) -> Any:
        change(job)
        return predict(self, job, rows)

    monkeypatch.setattr(mnn_format.MnnFormat, "predict", changed)
    monkeypatch.setattr(engine_process, "subprocess", Forked())


@pytest.mark.parametrize("file", ["llm.mnn", "llm.mnn.weight"])
def test_truncated_files_are_refused(file: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def truncate(job: Any) -> None:
        data = (job.folder / file).read_bytes()
        (job.folder / file).write_bytes(data[: len(data) // 2])

    after_predicting(monkeypatch, truncate)
    assert_says(refused(stage_folder(quantized, "int4"), tmp_path), "llm.mnn: MNN does not", "kept")


@pytest.mark.parametrize("missing", mnn_format.PACKAGES)
def test_without_the_packages_plan_says_which_extra(
    missing: str, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_process, "find_spec", lambda name: None if name == missing else find_spec(name))
    message = refusal("plan", recipe_of(tmp_path, make_checkpoint("glm"), export("source", format="mnn")))
    assert_says(message, "stages.1.format", f"{missing}: not installed", "pip install 'autoglm-compress[mnn]'")
