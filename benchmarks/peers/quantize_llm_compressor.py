"""Quantizes with llm-compressor's AWQ, in its own environment, and loads the result as plain weights.

    python quantize_llm_compressor.py quantize MODEL ROWS SETTING FOLDER
    python quantize_llm_compressor.py dequantize FOLDER

`quantize` writes FOLDER/checkpoint and FOLDER/seconds.json, `dequantize` FOLDER/dense.safetensors.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

FUSED = ("GlmForCausalLM", "Glm4ForCausalLM")
LEFT_OVER = ("weight_scale", "weight_zero_point", "weight_shape")


def quantize(folder: Path, rows: Path, setting: dict[str, Any], output: Path) -> None:
    """From checkpoint to checkpoint."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # It pins what the search reads again and again, which fails where there is no accelerator.
    IntermediatesCache.pin_memory = lambda *arguments: None
    token_ids = load_file(rows)["rows"]
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in token_ids]
    began = time.monotonic()
    model = _load(folder, setting)
    weights = {
        "num_bits": setting["bits"],
        "type": "int",
        "strategy": "group",
        "group_size": setting["group_size"],
        "symmetric": setting["symmetric"],
    }
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=None),
        recipe=[
            AWQModifier(mappings=_mappings(model)),
            QuantizationModifier(
                ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
            ),
        ],
        num_calibration_samples=len(samples),
        output_dir=str(output / "checkpoint"),
    )
    (output / "seconds.json").write_text(json.dumps(time.monotonic() - began))


def _load(folder: Path, setting: dict[str, Any]) -> PreTrainedModel:
    """The model; if `offload` names a folder, what does not fit in memory is there."""
    if "offload" not in setting:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=setting["dtype"])
    from compressed_tensors.offload import load_offloaded_model

    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=setting["dtype"], device_map="auto_offload", offload_folder=setting["offload"]
        )


def _mappings(model: PreTrainedModel) -> list[Any] | None:
    """What scales what where gate and up are one linear; None leaves it to llm-compressor."""
    from llmcompressor.modifiers.transform.awq import AWQMapping

    if type(model).__name__ not in FUSED:
        return None
    return [
        AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
        AWQMapping("re:.*v_proj$", ["re:.*o_proj$"]),
        AWQMapping("re:.*post_attention_layernorm$", ["re:.*gate_up_proj$"]),
        AWQMapping("re:.*gate_up_proj$", ["re:.*down_proj$"]),
    ]


def dequantize(folder: Path) -> None:
    """The checkpoint as transformers and compressed-tensors load it; zero points need `dequantize`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.endswith(LEFT_OVER)
    }
    save_file(tensors, folder / "dense.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]), Path(sys.argv[5]))
    else:
        dequantize(Path(sys.argv[2]))
