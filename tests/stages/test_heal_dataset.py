"""The rows of a dataset that healing trains on, and what `plan` says of their memory and disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.dataset import Dataset
from autoglm_compress.calibration.python_docs import split_of_text
from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.training_rows import deciding_rows, rows_to_fetch, set_apart
from autoglm_compress.errors import UserError
from autoglm_compress.healing import dataset_text
from support.command_line import plan
from support.running import write_recipe


@given(
    words=st.lists(st.integers(1, 40), max_size=40),
    wanted=st.integers(1, 30),
    length=st.integers(2, 60),
)
def test_rows_are_those_of_each_split_read_on_its_own(
    words: list[int], wanted: int, length: int, tokenizer: PreTrainedTokenizerFast
):
    texts = [f"document {number}" + " fox" * count for number, count in enumerate(words)]

    def rows_of(splits: str, most: int) -> list[list[int]]:
        ids = []
        for text in texts:
            if split_of_text(text) in splits.split():
                ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:most]

    most = deciding_rows(wanted, length, 1)
    rows, deciding = rows_of("fitted", wanted), rows_of("deciding", most)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dataset_text, "streamed", lambda *_: iter(texts))
        if not (rows and deciding):
            both = rows_of("fitted deciding", rows_to_fetch(wanted, length))
            if not both:
                with pytest.raises(UserError, match="not enough text for one row"):
                    dataset_text.dataset_rows(Dataset(dataset="some"), Reader(tokenizer), wanted, length)
                return
            apart = set_apart(torch.tensor(both), wanted, most)
            rows, deciding = apart.rows.tolist(), apart.deciding.tolist()
        found = dataset_text.dataset_rows(Dataset(dataset="some"), Reader(tokenizer), wanted, length)
    assert (found.rows.tolist(), found.deciding.tolist()) == (rows, deciding)
    assert found.rows.dtype == found.deciding.dtype == torch.int32


def test_the_plan_grows_with_the_tokens(make_checkpoint: Callable[..., Path], tmp_path: Path):
    def needs(tokens: str, data: object) -> tuple[int, int]:
        stage = {"stage": "heal", "tokens": tokens, "sequence_length": 32, "data": data}
        planned = plan(write_recipe(tmp_path, make_checkpoint("glm"), [stage]))
        return planned["checkpoints"][1]["peak_memory_bytes_estimate"], planned["disk_bytes_needed"]

    (few_memory, few_disk), (memory, disk) = (needs(tokens, {"dataset": "some"}) for tokens in ("2M", "1G"))
    assert memory - few_memory > 4 * 900e6
    assert disk - few_disk == 4 * 998_000_000
    assert needs("1G", "calibration")[1] == needs("2M", "calibration")[1]
