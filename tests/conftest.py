"""Tiny random models of every family, with a real tokenizer, on disk as `save_pretrained` leaves them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from questions import write_quiz
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from autoglm_compress.calibration.text import documents

pytest_plugins = ["resuming"]  # its fixtures serve several files, and one run is enough for all
transformers_logging.disable_progress_bar()

# Every family with the features that set it apart: sliding windows, biases, q/k norms, fused gates, sandwich norms.
FAMILIES: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
}
TEXT = "Return the number of items in a container. Raises TypeError where an object has no len(), or 数.\n"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(None, "calibration")[:20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Two rows of real text, longer than the sliding windows of the models that have one."""
    return torch.tensor(tokenizer(TEXT * 2)["input_ids"][:64]).view(2, 32)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build_model(family: str, **changes: object) -> torch.nn.Module:
    """A random model in bf16 whose norms, biases and weights are far from their initial values."""
    from transformers import AutoConfig

    settings = SHAPE | FAMILIES[family] | {"tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **(settings | {"initializer_range": 0.1, "dtype": "bfloat16"} | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def silence_channels(model: torch.nn.Module, first: int) -> None:
    """Leave nothing in the residual stream's channels from `first` on."""
    for name, tensor in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            tensor[:, first:] = 0
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            tensor[first:] = 0


@pytest.fixture(scope="session")
def make_checkpoint(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Save a tiny model of a family with its tokenizer; the same request gives the same (shared) folder."""
    made: dict[tuple, Path] = {}

    def make(family: str = "glm", **changes: object) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            build_model(family, **changes).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session", params=["glm", "glm4", "qwen3"])
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp32 to evaluate, of each family of `evaluating.py` in turn."""
    from evaluating import make_model

    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in fp32 to evaluate."""
    from evaluating import make_model

    return make_model(tmp_path_factory.mktemp("model"), "glm", seed=1)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """Questions of two subjects, of which MMLU has one, for a test to change."""
    return write_quiz(tmp_path, "anatomy", "high_school_rivers")
