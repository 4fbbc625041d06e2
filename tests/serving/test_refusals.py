"""What `serve` and `verify` refuse before anything is loaded."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from support.command_line import assert_says, refusal

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("llama")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    assert_says(refusal("serve", tmp_path / "none"), "no such folder")
    assert_says(refusal("serve", tmp_path), "no config.json")
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert_says(refusal("serve", tmp_path), "no safetensors")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert_says(refusal("serve", tmp_path), "config.json", "not JSON")
    (tmp_path / "config.json").write_text("{}")
    assert_says(refusal("serve", tmp_path), "num_attention_heads")


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    assert_says(refusal("serve", tmp_path / "model.bin"), "not a GGUF file")
    (tmp_path / "model.gguf").write_bytes(b"x" * 100)
    assert_says(refusal("serve", tmp_path / "model.gguf"), "not a whole GGUF file")
    (tmp_path / "other.gguf").write_bytes(b"x" * 100)
    assert_says(refusal("serve", tmp_path), "2 GGUF files", "model.gguf, other.gguf")


def test_exports_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    assert_says(refusal("serve", tmp_path), "ONNX Runtime", "export that as GGUF")


def test_a_whole_run(tmp_path: Path) -> None:
    (tmp_path / "01-ffn").mkdir()
    for file in ("manifest.json", "01-ffn/stage.json"):
        (tmp_path / file).write_text("{}")
    assert_says(refusal("serve", tmp_path), "is a whole run", "01-ffn")
    assert_says(refusal("serve", tmp_path / "ffn"), "01-ffn: no config.json")


def test_what_an_engine_cannot_take(
    checkpoint: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_says(refusal("serve", checkpoint, "--engine", "llama.cpp"), "Export it first", "--engine transformers")
    assert_says(refusal("serve", checkpoint, "--tensor-parallel", 2), "--engine vllm")
    assert_says(refusal("serve", checkpoint, "--engine", "vllm"), "no program vllm", "--engine transformers")

    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_says(refusal("serve", checkpoint, "--engine", "vllm"), "head_dim is 16", "--engine transformers")

    wide = tmp_path / "wide"
    shutil.copytree(make_checkpoint("llama", head_dim=32), wide)
    config = json.loads((wide / "config.json").read_text())
    group = {"weights": {"num_bits": 8}, "input_activations": None}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (wide / "config.json").write_text(json.dumps(config))
    with patch("autoglm_compress.serving.engines.has_gpu", lambda: False):
        assert_says(refusal("serve", wide, "--engine", "vllm"), "INT8", "no kernel on a CPU")


def test_keys_and_addresses(checkpoint: Path, tmp_path: Path) -> None:
    assert_says(refusal("serve", checkpoint, "--host", "0.0.0.0"), "--api-key-file")
    assert_says(refusal("serve", checkpoint, "--api-key-file", tmp_path / "none"), "none", "cannot be read")
    (tmp_path / "empty").write_text("\n")
    assert_says(refusal("serve", checkpoint, "--api-key-file", tmp_path / "empty"), "is empty")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_says(refusal("serve", checkpoint, "--port", port), str(port), "Address already in use")


def test_more_than_the_model_reads_and_more_than_fits(checkpoint: Path) -> None:
    assert_says(refusal("serve", checkpoint, "--max-model-len", 10**7), "10000000", "at most")
    with patch("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})):
        assert_says(refusal("serve", checkpoint), "are needed", "1 kB are free", "--max-model-len")


def test_a_package_that_is_not_there(checkpoint: Path) -> None:
    with patch("autoglm_compress.serving.command.has_package", lambda name: name != "uvicorn"):
        assert_says(refusal("serve", checkpoint), "uvicorn", "autoglm-compress[serve]")


def test_verify_without_a_server() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        assert_says(refusal("verify", "--base-url", url), url, "autoglm-compress serve")
