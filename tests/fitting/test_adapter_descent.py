"""Training what is before a shared projection, on the towers of a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.media_chats import MediaChats
from autoglm_compress.calibration.text import media_chats
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.fitting.adapter_descent import SharedTowers, batches_of
from autoglm_compress.forward.features import Features
from autoglm_compress.forward.projections import ProjectedChats, Towers
from support.media import save_omni, write_rows
from support.quiet import quiet

torch.set_num_threads(1)
ROWS = 24


@pytest.fixture
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Checkpoint:
    """A model that has read some rows with an image or a sound each."""
    found = Checkpoint(save_omni(tmp_path / "model", tokenizer))
    chats = MediaChats(found.folder, found.family)
    for chat in media_chats(write_rows(tmp_path, ROWS, sounds=True)):
        chats.ids(chat)
    found.features = Features(found, chats, tmp_path / "features", quiet(), torch.float32)
    return found


def test_features_come_nearer_and_nothing_else_is_trained(checkpoint: Checkpoint, tmp_path: Path):
    where = quiet()
    fitted, deciding = list(range(ROWS - 8)), list(range(ROWS - 8, ROWS))
    inputs = ProjectedChats(checkpoint, tmp_path / "inputs")
    inputs.record([*fitted, *deciding], where)
    towers = Towers(checkpoint, where.device, torch.float32)
    projections = {}
    for kind, linear in towers.linears.items():
        weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        projections[kind] = torch.cat([weight, bias[:, None]], 1)
    for number, kind in ((0, "image"), (1, "audio")):
        before, after = towers.run(number)
        assert before.keys() == after.keys() == {kind}
        weight, bias = projections[kind][:, :-1], projections[kind][:, -1]
        torch.testing.assert_close(after[kind][0], before[kind][0] @ weight.T + bias)
        assert torch.equal(inputs.of(number)[kind], before[kind][0])
    shared = SharedTowers(
        checkpoint, inputs, projections, projections["image"], {"image": 1.0, "audio": 1.0}, where.device
    )
    errors = shared.errors(deciding)
    assert errors["image"] < 1e-9 < errors["audio"]
    descent = shared.fit(batches_of(fitted, deciding), 4, where.progress)
    assert descent.after < 0.9 * descent.before
    assert shared.errors(deciding)["audio"] < 0.9 * errors["audio"]
    trained = shared.trained()
    assert {name.rpartition(".")[0].split(".layers.1")[0] for name in trained} == {
        "visual.merger.mlp.0",
        "audio_tower",
        "audio_tower.ln_post",
    }
    assert any(not torch.equal(tensor, checkpoint.read(name).float()) for name, tensor in trained.items())
