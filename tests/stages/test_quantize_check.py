"""The check of a quantized checkpoint: what it measures, and a stage that fails where predictions are lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoglm_compress.calibration.run_text import HELD_OUT_ROWS, HELD_OUT_TOKENS, CalibrationText
from autoglm_compress.calibration.text import documents
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint, awq_format, compressed_tensors_format
from autoglm_compress.errors import UserError
from autoglm_compress.evaluation.agreement import agreement
from autoglm_compress.quantization.grid import Grid
from support.command_line import assert_says, refusal
from support.quantizing import batches, make_model, plain_model, run_stage
from support.quiet import quiet
from support.running import run, stage_folders, write_recipe

torch.set_num_threads(1)
MakeCheckpoint = Callable[..., Path]
QUANTIZE = {"stage": "quantize", "bits": 8, "group_size": 32, "max_divergence": 0.1}
TEXT = "\n\n".join(f"{'Some words stand here. ' * 100}Paragraph {number}." for number in range(60))


# What is measured


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_agreement_is_that_of_the_predictions(tmp_path: Path, tied: bool):
    folders = [make_model(tmp_path / str(seed), "glm", seed=seed, tie_word_embeddings=tied) for seed in (0, 1)]
    run_stage(folders[0], tmp_path, bits=4, group_size=32)
    tokens = torch.cat(batches())
    for other in (folders[0], folders[1], tmp_path / "target"):
        found = agreement(Checkpoint(folders[0]), Checkpoint(other), batches(), quiet())
        expected, changed = (
            plain_model(Checkpoint(folder)).float()(tokens).logits.log_softmax(-1) for folder in (folders[0], other)
        )
        divergence = float((expected.exp() * (expected - changed)).sum(-1).mean())
        assert found.tokens == tokens.numel()
        assert found.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert found.top1 == pytest.approx(float((expected.argmax(-1) == changed.argmax(-1)).float().mean()), abs=0.01)
    same = agreement(Checkpoint(folders[0]), Checkpoint(folders[0]), batches(), quiet())
    assert (same.divergence, same.top1) == (0, 1)


def test_what_was_measured_is_in_the_decisions(tmp_path: Path):
    source = make_model(tmp_path / "source", "glm")
    context = run_stage(source, tmp_path, bits=8, group_size=32)
    found = agreement(Checkpoint(source), Checkpoint(tmp_path / "target"), batches(seed=2), quiet())
    measured = context.decisions["agreement"]
    assert measured["kl_divergence"] == pytest.approx(found.divergence, rel=1e-3)
    assert measured["same_next_token"] == pytest.approx(found.top1, rel=1e-3)
    assert measured["held_out_tokens"] == 2 * 2 * 32


# A stage that fails


def test_max_divergence_decides(tmp_path: Path):
    source = make_model(tmp_path / "source", "glm")
    found = run_stage(source, tmp_path, bits=4, group_size=32).decisions["agreement"]["kl_divergence"]
    run_stage(source, tmp_path, bits=4, group_size=32, max_divergence=1.01 * found)
    with pytest.raises(UserError, match="does not predict what") as caught:
        run_stage(source, tmp_path, bits=4, group_size=32, max_divergence=0.99 * found)
    assert_says(str(caught.value), "stage quantize", source, "nats over 128 held-out tokens", "%", "max_divergence")


def test_another_max_divergence_does_not_quantize_again(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    def recipe(limit: float) -> Path:
        return write_recipe(tmp_path, make_checkpoint("glm"), [QUANTIZE | {"bits": 4, "max_divergence": limit}])

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model*.safetensors")}

    command = ("--output", tmp_path / "out", "--device", "cpu")
    message = refusal("run", recipe(1e-9), *command)
    assert_says(message, "stage quantize", "1e-09 is allowed", "max_divergence")
    before = sorted(written().values())
    assert before
    run(recipe(0.5))
    assert sorted(written().values()) == before
    assert [folder.name for folder in stage_folders(tmp_path / "out")] == ["01-quantize"]
    message = refusal("run", recipe(1e-9), *command)  # a lower one is held against what was measured
    assert_says(message, "stage quantize", "1e-09 is allowed")
    run(recipe(0.5))
    assert sorted(written().values()) == before


def corrupt(monkeypatch: pytest.MonkeyPatch, form: object, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    pack = form.pack
    monkeypatch.setattr(form, "pack", lambda *args: pack(*args[:3], change(args[3]), *args[4:]))


DAMAGES = {
    "scales in another order": lambda scales: scales.flip(0),
    "scales of no use": lambda scales: torch.full_like(scales, 100),
    "signs lost": lambda scales: scales.abs() * -1,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_broken_fails_the_stage(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
):
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), [QUANTIZE])
    with monkeypatch.context() as patch:
        corrupt(patch, compressed_tensors_format, DAMAGES[damage])
        for _ in range(2):  # and a second run of it does not take the first one's for finished
            message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
            assert_says(" ".join(message.split()), "stage quantize", "KL divergence", "held-out tokens", "more bits")
            assert stage_folders(tmp_path / "out") == []
            metrics = tmp_path / "out/metrics.json"
            assert not metrics.exists() or len(json.loads(metrics.read_text())["stages"]) == 1
    run(recipe, "--fresh")
    assert [folder.name for folder in stage_folders(tmp_path / "out")] == ["01-quantize"]


def test_a_broken_awq_checkpoint_fails_the_stage(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(awq_format, "ORDER", (0, 1, 2, 3, 4, 5, 6, 7))
    unpack = awq_format._unpack_columns
    monkeypatch.setattr(awq_format, "_unpack_columns", lambda packed: unpack(packed).flip(1))
    stage = QUANTIZE | {"bits": 4, "format": "awq"}
    recipe = write_recipe(tmp_path, make_checkpoint("llama"), [stage])
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "stage quantize", "KL divergence")
    assert stage_folders(tmp_path / "out") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_fail_the_stage(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
):
    corrupt(monkeypatch, compressed_tensors_format, lambda scales: torch.full_like(scales, value))
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), [QUANTIZE])
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "weight_scale", "NaN or infinite")
    assert stage_folders(tmp_path / "out") == []


def test_predictions_that_are_not_finite_fail_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_model(tmp_path / "source", "llama")
    dequantize = compressed_tensors_format.dequantize

    def overflow(module, scheme, read, dtype):
        weight = dequantize(module, scheme, read, dtype)
        return weight * float("inf") if module == "model.layers.2.mlp.down_proj" else weight

    monkeypatch.setattr(compressed_tensors_format, "dequantize", overflow)
    with pytest.raises(UserError, match="mean KL divergence nan nats"):
        run_stage(source, tmp_path, bits=4, group_size=32)


def test_the_grid_is_what_the_check_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Integers that were rounded for another grid than the one that is stored."""
    source = make_model(tmp_path / "source", "llama")
    integers = Grid.integers

    def rounded(self, weight):
        return integers(replace(self, scales=self.scales * 8), weight)

    monkeypatch.setattr(Grid, "integers", rounded)
    with pytest.raises(UserError, match="does not predict"):
        run_stage(source, tmp_path, bits=8, group_size=32, method="round_to_nearest", max_divergence=0.1)


# The text it is on


def held_out(text: Path, model: Path, rows: int = 4, length: int = 32, **others: Path) -> tuple[torch.Tensor, str]:
    progress = quiet().progress
    files = {"text": text} | others
    source = "text" if not others else dict.fromkeys(files, 1)
    options = CalibrationOptions(source=source, samples=rows, sequence_length=length)
    found = torch.cat(CalibrationText(options, files, Checkpoint(model), progress).held_out())
    return found, progress.console.file.getvalue()


def test_text_that_was_held_out(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text, model = tmp_path / "text.txt", make_checkpoint("glm")
    text.write_text(TEXT)
    rows, said = held_out(text, model)
    assert said == ""
    assert rows.shape == (HELD_OUT_ROWS, 32)
    kept = Checkpoint(model).tokenizer().decode(rows[0])
    assert any(kept.split("<|endoftext|>")[0][:80] in document for document in documents(text, "held-out"))
    assert held_out(text, model, length=512)[0].numel() <= HELD_OUT_TOKENS
    assert torch.equal(held_out(text, model)[0], rows)


def test_too_little_held_out_text_falls_back_to_calibration_rows(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    text, model = tmp_path / "text.txt", make_checkpoint("glm")
    text.write_text("One paragraph. " * 300)
    assert documents(text, "held-out") == []
    rows, said = held_out(text, model)
    assert_says(said, "warning: too little calibration text", "calibration rows")
    assert rows.shape == (4, 32)


def test_one_source_of_two_with_held_out_text_is_enough(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    (tmp_path / "long.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("One paragraph. " * 300)
    rows, said = held_out(tmp_path / "long.txt", make_checkpoint("glm"), short=tmp_path / "short.txt")
    assert said == ""
    assert rows.shape == (HELD_OUT_ROWS // 2, 32)


@pytest.mark.parametrize("method", ["awq", "round_to_nearest"])
def test_a_run_says_that_the_check_is_on_calibration_rows(make_checkpoint: MakeCheckpoint, tmp_path: Path, method: str):
    (tmp_path / "text.txt").write_text("One paragraph. " * 300)
    calibration = {"source": "text.txt", "samples": 4, "sequence_length": 32}
    stage = QUANTIZE | {"method": method}
    output = run(write_recipe(tmp_path, make_checkpoint("glm"), [stage], calibration=calibration))
    assert output.count("the check is on calibration rows") == 1
    decisions = json.loads((tmp_path / "out/01-quantize/stage.json").read_text())["decisions"]
    assert decisions["agreement"]["held_out_tokens"] == 4 * 32


def test_a_tokenizer_of_another_model(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    """Rounding looks at no calibration text, so that the check is the first to see the tokens."""
    model = make_checkpoint("glm", vocab_size=300)
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = {"source": "text.txt", "samples": 4, "sequence_length": 32}
    stage = QUANTIZE | {"method": "round_to_nearest"}
    recipe = write_recipe(tmp_path, model, [stage], calibration=calibration, evaluation={"every_stage": []})
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, model, "vocab_size", "300", "tokenizer")


def test_too_little_text_is_said_before_work_starts(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    (tmp_path / "text.txt").write_text("Three words here.")
    calibration = {"source": "text.txt", "samples": 4, "sequence_length": 32}
    stage = QUANTIZE | {"method": "round_to_nearest"}
    recipe = write_recipe(tmp_path, make_checkpoint("glm"), [stage], calibration=calibration)
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "text.txt", "not enough for one row")
    assert not (tmp_path / "out").exists()
