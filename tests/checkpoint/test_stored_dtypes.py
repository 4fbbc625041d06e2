"""What weights are stored in: the files say it, and every value that is written is a number."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.errors import UserError
from support.command_line import assert_says, plan, refusal
from support.running import compress, invoke, stage_folders, tensors_of, write_recipe

torch.set_num_threads(1)
AUTO = {"stage": "quantize", "bits": "auto", "group_size": 32}
Stored = Callable[[torch.dtype, str | None], Path]


@pytest.fixture
def stored(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Stored:
    """A checkpoint whose weights have one dtype and whose config says another, or none."""

    def make(dtype: torch.dtype, said: str | None) -> Path:
        folder = copytree(make_checkpoint("llama"), tmp_path / "source")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config | ({"dtype": said} if said else {})))
        return folder

    return make


@pytest.mark.parametrize(("dtype", "said"), [(torch.float32, "bfloat16"), (torch.bfloat16, None)])
def test_sizes_are_those_of_the_files(stored: Stored, tmp_path: Path, dtype: torch.dtype, said: str | None):
    source = stored(dtype, said)
    held = sum(tensor.nbytes for tensor in tensors_of(source).values())
    [planned, _] = plan(write_recipe(tmp_path, source, [{"stage": "depth", "layers": [0]}]))["checkpoints"]
    assert planned["bytes"] == Checkpoint(source).shape.bytes == held
    assert json.loads(invoke("inspect", source, "--json").output)["shape"]["dtype"] == str(dtype).split(".")[1]


def test_a_budget_of_bytes_holds_for_weights_of_another_dtype(stored: Stored, tmp_path: Path):
    source = stored(torch.float32, "bfloat16")
    least = Checkpoint(source).shape
    budget = plan(write_recipe(tmp_path, source, [{"stage": "quantize", "bits": 4, "group_size": 32}]))["checkpoints"][
        1
    ]["bytes"]
    assert budget < least.bytes
    folder = compress(tmp_path / "run", source, AUTO | {"budget": {"bytes": budget + 10_000}, "max_divergence": 100})
    assert sum(tensor.nbytes for tensor in tensors_of(folder).values()) <= budget + 10_000


def test_what_leaves_the_range_of_fp16_is_never_written(stored: Stored, tmp_path: Path):
    source = Checkpoint(stored(torch.float16, "float16"))
    writer = CheckpointWriter(tmp_path / "target", 1)
    large = torch.full((2, 2), 1e6).to(torch.float16)
    with pytest.raises(
        UserError,
        match=r"model\.norm\.weight: 4 of 4 values would be NaN or infinite: they leave the range of float16.*bfloat16",
    ):
        writer.write(0, {"model.norm.weight": large})
    assert list(writer.folder.iterdir()) == []
    assert source.dtype == torch.float16


def test_a_stage_that_would_write_infinity_names_the_tensor(stored: Stored, tmp_path: Path):
    """Turning the residual stream multiplies readers by gains: here they leave the range of fp16."""
    source = stored(torch.float16, "float16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(6e4)
    tensors["model.layers.0.self_attn.q_proj.weight"].mul_(1e3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, source, [{"stage": "width", "hidden_size": 32}], evaluation={"every_stage": []})
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, "model.layers.0.", "leave the range of float16", "bfloat16")
    assert stage_folders(tmp_path / "out") == []


def test_a_dtype_that_cannot_be_computed_with_is_named(stored: Stored):
    source = stored(torch.float64, "float32")
    assert_says(refusal("inspect", source), "float64, expected floating-point numbers: float32, bfloat16, float16")


def with_unknown_dtype(source: Path, name: str) -> Path:
    """Give a checkpoint one more tensor, or another in the place of one, of a dtype that nobody knows."""
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: torch.zeros(8, dtype=torch.uint8)}, source / "model.safetensors")
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name]["dtype"] = "F3_E1M1"
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    return source


def test_an_unused_tensor_of_an_unknown_dtype_is_left_out(stored: Stored):
    source = with_unknown_dtype(stored(torch.bfloat16, "bfloat16"), "model.extra_state")
    assert Checkpoint(source).left_out == ("model.extra_state",)
    assert json.loads(invoke("inspect", source, "--json").output)["left_out"] == ["model.extra_state"]


def test_a_weight_of_an_unknown_dtype_is_named(stored: Stored):
    source = with_unknown_dtype(stored(torch.bfloat16, "bfloat16"), "model.norm.weight")
    assert_says(refusal("inspect", source), "model.norm.weight: F3_E1M1, expected floating-point numbers")
