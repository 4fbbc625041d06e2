"""Exports to MNN: what is in the files, what the engine makes of them, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoglm_compress.export.engine_process import has_package
from autoglm_compress.export.mnn_format import MnnFormat
from autoglm_compress.export.mnn_integers import alpha, header, packed_rows
from autoglm_compress.export.mnn_names import WEIGHTS
from support.command_line import assert_says, refusal
from support.exporting import export, quantize, recipe_of, record, run_stages, stage_folder

pytestmark = pytest.mark.skipif(not (has_package("MNN") and has_package("llmexport")), reason="needs the extra mnn")
torch.set_num_threads(1)
Make = Callable[..., Path]


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(rows: int, groups: int, bits: int, zeros: bool, seed: int):
    """Unpacked one number at a time, as the layout is described."""
    generator, half, group = torch.Generator().manual_seed(seed), 1 << (bits - 1), 8
    integers = torch.randint(-half, half, (rows, groups * group), generator=generator).to(torch.int8)
    scales = torch.randn(rows, groups, generator=generator).bfloat16()
    points = torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8) if zeros else None
    first, wide = header(rows, groups * group, bits)
    assert (first[0], np.frombuffer(first[1:5], np.uint16).tolist(), wide) == (2, [rows, groups * group], False)
    assert np.frombuffer(first[6:], np.int8).tolist() == list(range(-half, half))
    packed, numbers = packed_rows(integers, bits), alpha(scales, points)
    for row in range(rows):
        for column in range(groups * group):
            byte = int(packed[row, column * bits // 8])
            stored = byte if bits == 8 else (byte >> 4 if column % 2 == 0 else byte & 15)
            part = numbers[row, column // group]
            low, scale = part if zeros else (0.0, part)
            q = stored - half
            exact = (q - (int(points[row, column // group]) if zeros else 0)) * float(scales[row, column // group])
            assert q == integers[row, column]
            assert float(low) + q * float(scale) == pytest.approx(exact, abs=1e-6)
            assert float(scale) == float(scales[row, column // group])


@pytest.mark.parametrize("family", ["glm", "glm4", "llama", "mistral", "qwen2", "qwen3"])
def test_every_family_is_proven(family: str, make_checkpoint: Make, tmp_path: Path):
    output = run_stages(
        tmp_path, make_checkpoint(family), quantize("zeros"), export("zeros", format="mnn", name="small")
    )
    folder = stage_folder(tmp_path / "out", "small")
    decided = record(folder)
    assert decided["verified"] is True
    assert decided["proof"]["kl_divergence"] < 1e-6
    assert 0 < decided["proof"]["low_memory_kl_divergence"] < 5e-3
    assert decided["proof"]["same_greedy_token"] > 0.9
    assert "all exactly the checkpoint's" in output
    assert_says((folder / "README.md").read_text(), "llm_demo config.json", "MNN")


def swapped_nibbles(weights: bytes) -> bytes:
    """Those of the first linear, which come after a norm and a header."""
    first, last = 2 * 4 * 64 + 22, 2 * 4 * 64 + 22 + 128 * 32
    return weights[:first] + bytes(b >> 4 | (b & 15) << 4 for b in weights[first:last]) + weights[last:]


def test_a_file_that_is_wrong_is_refused_and_not_published(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = MnnFormat.write

    def wrongly(self, job):
        exactness, file = write(self, job), job.folder / WEIGHTS
        file.write_bytes(swapped_nibbles(file.read_bytes()))
        return exactness

    monkeypatch.setattr(MnnFormat, "write", wrongly)
    recipe = recipe_of(tmp_path, make_checkpoint("glm"), quantize("int4"), export("int4", format="mnn"))
    message = " ".join(refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu").split())
    assert_says(message, "llm.mnn: MNN does not predict", "KL divergence", "not kept")
    assert list((tmp_path / "out").rglob("*.mnn")) == []


def test_a_head_in_eight_bits_is_refused_with_the_line(make_checkpoint: Make, tmp_path: Path):
    stages = quantize("int4"), export("int4", format="mnn", embedding_bits=8)
    assert_says(refusal("plan", recipe_of(tmp_path, make_checkpoint("glm"), *stages)), "embedding_bits", "16 bits")
