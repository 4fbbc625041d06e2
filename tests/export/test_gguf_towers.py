"""Exports to GGUF of models with towers beside the text: the text tower, as llama.cpp runs it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.checkpoint import Checkpoint
from support.exporting import exact_weight, export, metadata, quantize, record, run_stages, stage_folder, stored
from support.multimodal import FAMILIES, save

torch.set_num_threads(1)
ENGINE = {
    "glm4v": "glm4",
    "glm46v": "glm4",
    "qwen2_5_vl": "qwen2",
    "qwen3vl": "qwen3vl",
    "qwen2_5omnithinker": "qwen2",
    "qwen2audio": "qwen2",
    "glmasr": "llama",
    "voxtral": "llama",
}
SECTIONS = {"glm4": [2, 3, 3, 0], "qwen3vl": [3, 3, 2, 0]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_tower_is_exact_and_proven_and_what_stays_behind_is_said(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = save(name, tmp_path / "source", tokenizer)
    output = run_stages(tmp_path, source, quantize("int4"), export("int4"), export("source"))
    towers = ", ".join(Checkpoint(source).family.kept)
    assert f"the file is the text tower alone, which reads text: {towers} stay behind" in output
    for checkpoint in ("int4", "source"):
        folder = stage_folder(tmp_path / "out", f"{checkpoint}-gguf")
        decided = record(folder)
        assert decided["verified"] is True
        assert decided["proof"]["kl_divergence"] < (1e-5 if checkpoint == "source" else 1e-3)
        assert towers in (folder / "README.md").read_text()
    told = metadata(stage_folder(tmp_path / "out", "int4-gguf"))
    assert told["general.architecture"] == ENGINE[name]
    assert told.get(f"{ENGINE[name]}.rope.dimension_sections") == SECTIONS.get(ENGINE[name])
    checkpoint = Checkpoint(stage_folder(tmp_path / "out", "int4"))
    kind, values = stored(stage_folder(tmp_path / "out", "int4-gguf"))["blk.1.ffn_down.weight"]
    exact = exact_weight(checkpoint, f"{checkpoint.family.layer_prefix(1)}mlp.down_proj")
    assert kind == "Q4_0"
    assert np.array_equal(values, exact.float().numpy())
