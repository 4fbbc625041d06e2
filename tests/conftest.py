"""Tiny random models of every family, with a real tokenizer, on disk as `save_pretrained` leaves them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub client

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from autoglm_compress.calibration.text import documents
from support.models import FAMILIES, SHAPE, TEXT, build_model
from support.questions import write_quiz

pytest_plugins = ["support.plug_ins", "support.resuming"]  # whose fixtures serve several files
transformers_logging.disable_progress_bar()


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


@pytest.fixture(scope="session")
def make_checkpoint(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Save a tiny model of a family with its tokenizer; the same request gives the same (shared) folder."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "glm", **changes: object) -> Path:
        key = (family, repr(sorted(changes.items())))
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
    from support.evaluating import make_model

    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in fp32 to evaluate."""
    from support.evaluating import make_model

    return make_model(tmp_path_factory.mktemp("model"), "glm", seed=1)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """Questions of two subjects, of which MMLU has one, for a test to change."""
    return write_quiz(tmp_path, "anatomy", "high_school_rivers")


@pytest.fixture
def zero_points_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that loads asymmetric compressed-tensors, which the installed one need not be."""
    monkeypatch.setattr("autoglm_compress.quantization.checks.transformers_loads", lambda _: True)
