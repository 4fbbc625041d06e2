"""The state of training on disk: tensors as safetensors, numbers as JSON. It is complete or absent."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from autoglm_compress.checkpoint.writer import save_atomically, write_json


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Replace the state in a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_atomically(partial / "tensors.safetensors", dict(tensors))
    write_json(partial / "numbers.json", numbers, indent=None)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state in a folder, None if there is none."""
    old = folder.with_name(f"{folder.name}.old")
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    if not folder.exists():
        return None
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
