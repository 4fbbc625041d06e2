"""Zero points in compressed-tensors: refused where transformers does not load them, which a tiny model tells."""

from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from autoglm_compress.architecture import Scheme
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import PlanError
from autoglm_compress.quantization.loading_probe import transformers_loads
from autoglm_compress.stages.quantize import Quantize
from support.command_line import assert_says
from support.quantizing import loaded_logits, logits, make_model, plain_model, run_stage, shape_of

torch.set_num_threads(1)


@pytest.mark.parametrize(("bits", "cure"), [(4, "`format: awq`"), (8, "leave it out")])
def test_zero_points_that_transformers_does_not_load_are_refused(bits: int, cure: str):
    shape, stage = shape_of("llama"), Quantize(stage="quantize", bits=bits, symmetric=False, group_size=32)
    with patch("autoglm_compress.quantization.checks.transformers_loads", lambda scheme: scheme.bits != bits):
        with pytest.raises(PlanError, match=cure) as caught:
            stage.plan(shape)
        assert caught.value.option == "symmetric"
        assert_says(str(caught.value), "transformers", version("transformers"), "zero points")
    with patch("autoglm_compress.quantization.checks.transformers_loads", lambda scheme: not scheme.symmetric):
        assert not any(scheme.symmetric for scheme in stage.plan(shape).quantization.schemes.values())
        assert stage.warnings(shape) == []


def test_what_does_not_ask_for_zero_points_is_not_tried():
    with patch("autoglm_compress.quantization.checks.transformers_loads", lambda _: pytest.fail("tried")):
        for options in ({}, {"symmetric": True}, {"format": "awq"}, {"format": "awq", "symmetric": False}):
            Quantize(stage="quantize", bits=4, group_size=32, **options).plan(shape_of("llama"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tiny_model_tells_what_transformers_loads(
    tmp_path: Path,
    zero_points_load: None,
    capfd: pytest.CaptureFixture[str],
    bits: int,
    group_size: int,
    symmetric: bool,
):
    found = transformers_loads(Scheme(bits, group_size, symmetric))
    assert capfd.readouterr() == ("", "")
    source = make_model(tmp_path / "source", "llama")
    run_stage(source, tmp_path, bits=bits, group_size=group_size, symmetric=symmetric, method="round_to_nearest")
    try:
        loaded = loaded_logits(tmp_path / "target")
    except RuntimeError:
        assert not found
    else:
        assert found is torch.equal(loaded, logits(plain_model(Checkpoint(tmp_path / "target"))))
    assert found or not symmetric
