"""A model that thinks, as a checkpoint and as a GGUF file."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from support.running import invoke
from support.thinker import make_thinker


@pytest.fixture(scope="session")
def thinker(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_thinker(tmp_path_factory.mktemp("thinker"), tokenizer)


@pytest.fixture(scope="session")
def thinker_gguf(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "exported"
    result = invoke("export", thinker, "--format", "gguf", "--output", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder
