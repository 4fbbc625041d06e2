"""The proof refuses files that are wrong, and says so where there is no engine."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from autoglm_compress.export import engine_process, gguf_blocks, gguf_format, gguf_tensors
from autoglm_compress.export.proof import EnginePrediction, prove
from support.command_line import assert_says, refusal
from support.exporting import export, quantize, recipe_of, record, run_stages, stage_folder
from support.quiet import quiet
from support.running import load, logits, result_folders, run

torch.set_num_threads(1)
Make = Callable[..., Path]
blocks_of = gguf_blocks._blocks


def swapped_nibbles(integers: torch.Tensor, kinds: list[torch.Tensor], bits: int) -> np.ndarray:
    blocks = blocks_of(integers, kinds, bits).copy()
    nibbles = blocks.reshape(len(blocks), -1, 18)[..., 2:]
    nibbles[...] = (nibbles >> 4) | (nibbles << 4)
    return blocks


def scales_of_the_next_group(integers: torch.Tensor, kinds: list[torch.Tensor], bits: int) -> np.ndarray:
    return blocks_of(integers, [kinds[0].roll(1, 1)], bits)


MUTANTS = {
    "swapped nibbles": (gguf_blocks, "_blocks", swapped_nibbles),
    "scales of the next group": (gguf_blocks, "_blocks", scales_of_the_next_group),
    "q and k in the checkpoint's order": (gguf_tensors, "row_order", lambda *_: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_file_that_is_wrong_is_refused_and_not_published(
    mutant: str, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(tmp_path, make_checkpoint("llama"), quantize("int4"), export("int4"))
    with monkeypatch.context() as patched:
        patched.setattr(*MUTANTS[mutant])
        message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
        assert_says(
            " ".join(message.split()), "int4-Q4_0.gguf: llama.cpp does not predict", "KL divergence", "not kept"
        )
        assert [folder.name for folder in result_folders(tmp_path / "out")] == ["01-int4"]
        assert list((tmp_path / "out").rglob("*.gguf")) == []
    run(recipe)  # the file is made again, and rightly
    assert record(stage_folder(tmp_path / "out", "int4-gguf"))["proof"]["kl_divergence"] < 1e-3


def test_a_truncated_file_is_refused(make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predict = gguf_format.GgufFormat.predict

    def after_truncation(self, job, rows):
        file = self.file(job)
        file.write_bytes(file.read_bytes()[:-5000])
        return predict(self, job, rows)

    monkeypatch.setattr(gguf_format.GgufFormat, "predict", after_truncation)
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), export("source"))
    message = " ".join(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu").split())
    assert_says(message, "-F16.gguf: llama.cpp does not take it", "corrupted or incomplete", "Nothing was kept")
    assert list((tmp_path / "out").rglob("*.gguf")) == []


def test_without_the_engine_nothing_is_proven_and_that_is_said(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_process, "find_spec", lambda name: None if name == "xllamacpp" else find_spec(name))
    output = run_stages(tmp_path, make_checkpoint("glm"), export("source"))
    assert "warning: 01-source-gguf: xllamacpp is not installed, so the file will not be proven" in output
    decided = record(stage_folder(tmp_path / "out", "source-gguf"))
    assert decided["verified"] is False
    assert "proof" not in decided
    assert "**not proven**" in (stage_folder(tmp_path / "out", "source-gguf") / "README.md").read_text()


def test_without_the_writer_plan_says_which_extra(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_process, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    message = refusal("plan", recipe_of(tmp_path, make_checkpoint("glm"), export("source")))
    assert_says(message, "stages.1.format", "pip install 'autoglm-compress[gguf]'")


def test_the_measures_are_those_of_whole_models(make_checkpoint: Make, tmp_path: Path):
    """Against logits of plain transformers, with an engine that is another model."""
    from autoglm_compress.checkpoint import Checkpoint

    right, other = make_checkpoint("glm"), make_checkpoint("glm", initializer_range=0.11)
    rows, continuations = torch.randint(0, 512, (2, 10)), torch.randint(0, 512, (2, 3))
    whole = torch.cat([rows, continuations], 1)
    exact, found = (logits(load(folder), whole).double() for folder in (right, other))
    np.save(tmp_path / "logits.npy", found.float().numpy())
    prediction = EnginePrediction(tmp_path / "logits.npy", continuations.tolist())
    proof = prove(Checkpoint(right), rows, prediction, quiet())
    ours, theirs = exact.log_softmax(-1), found.log_softmax(-1)
    assert proof.divergence == pytest.approx(float((ours.exp() * (ours - theirs)).sum(-1).mean()), rel=1e-4)
    assert proof.top1 == pytest.approx(float((exact.argmax(-1) == found.argmax(-1)).double().mean()))
    assert proof.greedy == pytest.approx(float((exact[:, 9:12].argmax(-1) == continuations).double().mean()))
    centred = [values - values.mean(-1, keepdim=True) for values in (exact, found)]
    error = float((centred[1] - centred[0]).square().sum() / centred[0].square().sum())
    assert proof.logit_error == pytest.approx(error, rel=1e-4)
    assert proof.positions == 26
