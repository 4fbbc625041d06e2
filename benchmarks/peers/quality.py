"""What quantization cost: perplexity, and how far the next-token distributions moved, all in fp32."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from autoglm_compress import Checkpoint

Tensors = dict[str, torch.Tensor]
ROWS_AT_ONCE = 4


def stored(folder: Path) -> Tensors:
    """The weights of a checkpoint of ours, dequantized by our reader."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name, _ in checkpoint.shape.tensors()}


def build(config_folder: Path, tensors: Tensors) -> PreTrainedModel:
    """The plain model with these weights; they must be all it has."""
    config = AutoConfig.from_pretrained(config_folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the weights do not fit: missing {sorted(set(missing) - tied)}, unexpected {unexpected}")
    return model


@torch.no_grad()
def compare(original: PreTrainedModel, quantized: PreTrainedModel, rows: torch.Tensor) -> dict[str, Any]:
    """Perplexity of the quantized model, KL(original || quantized) in nats and agreement of the likeliest token.

    KL and agreement count every position of rows [samples, length], perplexity those that another token follows.
    """
    divergence = agreement = loss = 0.0
    for batch in rows.split(ROWS_AT_ONCE):
        expected = original(batch).logits.double().log_softmax(-1)
        found = quantized(batch).logits.double().log_softmax(-1)
        divergence += float((expected.exp() * (expected - found)).sum())
        agreement += float((expected.argmax(-1) == found.argmax(-1)).sum())
        loss -= float(found[:, :-1].gather(-1, batch[:, 1:, None]).sum())
    return {
        "perplexity": math.exp(loss / rows[:, 1:].numel()),
        "kl": divergence / rows.numel(),
        "top1": agreement / rows.numel(),
    }
