"""Rows with images and sounds: ids, positions and features are those of plain transformers."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.reader import Reader, reader_of
from autoglm_compress.calibration.text import documents
from autoglm_compress.calibration.tokens import packed_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.features import Features
from autoglm_compress.forward.one_layer_model import final_norm
from autoglm_compress.forward.walk import walk
from support.media import PROCESSORS, save_with_processor, write_rows
from support.multimodal import load
from support.quiet import quiet

torch.set_num_threads(1)
CPU = torch.device("cpu")
MEDIA_INPUTS = ("pixel_values", "image_grid_thw", "input_features", "feature_attention_mask")


@pytest.fixture(scope="module", params=PROCESSORS)
def model(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_with_processor(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


def seeing(model: Path, folder: Path) -> tuple[Checkpoint, Reader]:
    checkpoint = Checkpoint(model)
    reader = reader_of(model, checkpoint.family, checkpoint.tokenizer())
    assert reader.media is not None
    checkpoint.features = Features(checkpoint, reader.media, folder, quiet(), torch.float32)
    return checkpoint, reader


@torch.no_grad()
def test_a_walk_gives_what_plain_transformers_does(model: Path, tmp_path: Path):
    file = write_rows(tmp_path, 12, "omni" in str(model))
    checkpoint, reader = seeing(model, tmp_path / "features")
    whole = load(model)
    norm, head = final_norm(checkpoint, CPU), checkpoint.head_weight().float()
    read = [document for split in ("calibration", "held-out") for document in documents(file, split)]
    for chat in read[:4]:
        inputs = reader.media.inputs_of(chat)
        ids = torch.tensor([reader.media.ids(chat)])
        [states] = walk(checkpoint, [ids], None, runtime=quiet(), title="walk")
        torch.testing.assert_close(norm(states) @ head.T, whole(**inputs).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_several_chats_are_one_conversation(model: Path, tmp_path: Path):
    """Chats one after the other in a row, the last one cut, are what transformers makes of them joined."""
    file = write_rows(tmp_path, 12, "omni" in str(model))
    checkpoint, reader = seeing(model, tmp_path / "features")
    whole = load(model)
    norm, head = final_norm(checkpoint, CPU), checkpoint.head_weight().float()
    read = documents(file, "calibration")
    length = 100
    rows = packed_rows(reader, read, 3, length)
    assert rows.shape == (3, length)
    for line in rows:
        numbers = [number for number in reader.media.owners(line).tolist() if number >= 0]
        joined = {}
        for number in range(numbers[0], min(numbers[-1] + 2, len(read))):  # the last may be cut before its features
            inputs = reader.media.inputs_of(reader.media.chat(number))
            end = torch.tensor([[reader.tokenizer.eos_token_id]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], end], dim=1)
            for name, value in inputs.items():
                joined.setdefault(name, []).append(value)
        ids = torch.cat(joined["input_ids"], dim=1)
        given = {name: torch.cat(values) for name, values in joined.items() if name.startswith(MEDIA_INPUTS)}
        given["input_ids"], given["attention_mask"] = ids, torch.ones_like(ids)
        if "mm_token_type_ids" in joined:
            given["mm_token_type_ids"] = (ids == checkpoint.whole_config.image_token_id).int()
        expected = whole(**given).logits[:, :length]
        [states] = walk(checkpoint, [line[None]], None, runtime=quiet(), title="walk")
        torch.testing.assert_close(norm(states) @ head.T, expected, rtol=1e-4, atol=1e-4)
    assert (rows >= checkpoint.shape.vocab_size).any(1).all()
