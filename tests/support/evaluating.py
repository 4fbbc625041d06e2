"""Tiny models in fp32 for evaluation, and lm-eval's own model to hold ours against."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.evaluation.layerwise_lm import LayerwiseLM
from support.quiet import quiet

WORDS = "the answer of a question is one letter and every model reads many words of text about numbers trees rivers"
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
CONFIGS = {
    "glm": GlmConfig(**SIZES, attention_bias=True),
    "glm4": Glm4Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator([WORDS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


@torch.no_grad()
def make_model(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A random model with its tokenizer, whose final norm is not that of a fresh one."""
    torch.manual_seed(seed)
    config = deepcopy(CONFIGS[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    model.model.norm.weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def layerwise(folder: Path, **options: int) -> LayerwiseLM:
    return LayerwiseLM(Checkpoint(folder), runtime=quiet(), title="evaluate", **options)


def hugging_face(folder: Path) -> Any:
    """lm-eval's own model for the whole checkpoint in memory."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=3, device="cpu")
