"""The proof refuses ONNX files that are wrong, and nothing of them is kept."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoglm_compress.export import engine_process, onnx_builder, onnx_families, onnx_format, onnx_matrices
from autoglm_compress.export.onnx_blocks import BlockLayout
from autoglm_compress.export.onnx_builder import GraphModel
from support.command_line import assert_says, refusal
from support.exporting import export, quantize, recipe_of, record, stage_folder
from support.running import result_folders, run

torch.set_num_threads(1)
Make = Callable[..., Path]
pack_weights, pack_scales, pack_zeros = onnx_matrices.pack_weights, onnx_matrices.pack_scales, onnx_matrices.pack_zeros
frequencies = onnx_builder.rope_frequencies


def onnx(checkpoint: str, **options: Any) -> dict[str, Any]:
    return export(checkpoint, **({"name": f"{checkpoint}-onnx", "format": "onnx"} | options))


def swapped_nibbles(layout: BlockLayout, integers: torch.Tensor) -> np.ndarray:
    stored = pack_weights(layout, integers)
    return (stored >> 4) | (stored << 4)


def scales_of_the_next_group(layout: BlockLayout, scales: torch.Tensor) -> np.ndarray:
    return pack_scales(layout, scales.roll(1, 1))


def zeros_of_the_next_group(layout: BlockLayout, zeros: torch.Tensor) -> np.ndarray:
    return pack_zeros(layout, zeros.roll(1, 1))


def halves_turned(shape: Any) -> Any:
    return replace(onnx_families.graph_family(shape), interleaved=False)


def other_frequencies(config: Any, auto_class: str) -> tuple[torch.Tensor, float]:
    found, scale = frequencies(config, auto_class)
    return found * 1.05, scale


def up_before_gate(self: GraphModel, layer_id: int, mlp: Any, gate_up_linear: Any, root_input: str) -> None:
    unpacked(self, layer_id, mlp, gate_up_linear, root_input)
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


unpacked = GraphModel.make_mlp_unpacked_regular
MUTANTS = {
    "swapped nibbles": (onnx_matrices, "pack_weights", swapped_nibbles, "int4"),
    "scales of the next group": (onnx_matrices, "pack_scales", scales_of_the_next_group, "int4"),
    "scales of the next group, 8 bits": (onnx_matrices, "pack_scales", scales_of_the_next_group, "int8"),
    "zero points of the next group": (onnx_matrices, "pack_zeros", zeros_of_the_next_group, "awq"),
    "halves turned instead of neighbours": (onnx_builder, "graph_family", halves_turned, "int4"),
    "frequencies 5 % too high": (onnx_builder, "rope_frequencies", other_frequencies, "int4"),
    "up in the place of gate": (GraphModel, "make_mlp_unpacked_regular", up_before_gate, "int4"),
    "no norms before adding": (GraphModel, "_norm_what_is_added", lambda *_: None, "int4"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_files_that_are_wrong_are_refused_and_not_published(
    mutant: str, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    where, name, wrong, kind = MUTANTS[mutant]
    recipe = recipe_of(tmp_path, make_checkpoint("glm4"), quantize(kind), onnx(kind))
    with monkeypatch.context() as patched:
        patched.setattr(where, name, wrong)
        message = " ".join(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu").split())
        assert_says(message, "model.onnx: ONNX Runtime does not predict", "KL divergence", "not kept")
        assert [folder.name for folder in result_folders(tmp_path / "out")] == [f"01-{kind}"]
        assert list((tmp_path / "out").rglob("model.onnx*")) == []
    run(recipe)  # the files are made again, and rightly
    assert record(stage_folder(tmp_path / "out", f"{kind}-onnx"))["proof"]["kl_divergence"] < 5e-3


def test_truncated_tensors_are_refused(make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predict = onnx_format.OnnxFormat.predict

    def after_truncation(self, job, rows):
        data = self.files(job)[1]
        data.write_bytes(data.read_bytes()[:-5000])
        return predict(self, job, rows)

    monkeypatch.setattr(onnx_format.OnnxFormat, "predict", after_truncation)
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), onnx("source"))
    message = " ".join(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu").split())
    assert_says(message, "model.onnx: ONNX Runtime does not take it", "out of bounds", "Nothing was kept")
    assert list((tmp_path / "out").rglob("model.onnx*")) == []


@pytest.mark.parametrize("missing", onnx_format.PACKAGES)
def test_without_the_packages_plan_says_which_extra(
    missing: str, make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_process, "find_spec", lambda name: None if name == missing else find_spec(name))
    message = refusal("plan", recipe_of(tmp_path, make_checkpoint("glm"), onnx("source")))
    assert_says(message, "stages.1.format", f"{missing}: not installed", "pip install 'autoglm-compress[onnx]'")
