"""Whole `transformers` models from checkpoints, for work that cannot go layer by layer."""

from typing import Any

import torch

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.scaled_linear import ScaledLinear


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, keep_integers: bool = False) -> Any:
    """A causal language model with all of a checkpoint's weights, of a family that is a text tower alone.

    Quantized linears are dequantized, or those of the layers become `ScaledLinear`s.
    """
    from transformers import AutoModelForCausalLM

    config = checkpoint.unquantized_config()
    config.attention_dropout = 0.0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = checkpoint.shape.quantization
    head = checkpoint.family.roles.head
    kept = {name for name in quantization.schemes if name != head} if quantization and keep_integers else set()
    for module in kept:
        model.set_submodule(module, ScaledLinear.of(checkpoint, module, device, dtype))
    names = (name for name, _ in checkpoint.shape.tensors() if name.removesuffix(".weight") not in kept)
    weights = {name: checkpoint.read(name).to(device, dtype) for name in names}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    text = model.get_decoder()
    text.rotary_emb = type(text.rotary_emb)(config=config).to(device)
    return model.eval()
