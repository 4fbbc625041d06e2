"""Quantizes with AutoAWQ, through the package's backend, and brings the result back to plain weights by AutoAWQ's code.

    python quantize_autoawq.py quantize MODEL ROWS SETTING FOLDER
    python quantize_autoawq.py dequantize FOLDER

`quantize` writes FOLDER/quantized.safetensors and FOLDER/seconds.json, `dequantize` FOLDER/dense.safetensors.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from autoglm_compress.quantization.autoawq_backend import BITS, quantize_with_autoawq


def quantize(model: Path, rows: Path, setting: dict[str, Any], folder: Path) -> None:
    """From checkpoint to checkpoint."""

    token_ids = load_file(rows)["rows"]
    began = time.monotonic()
    tensors = quantize_with_autoawq(model, token_ids, setting["group_size"], getattr(torch, setting["dtype"]))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "quantized.safetensors",
        metadata={"group_size": str(setting["group_size"])},
    )
    (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))


def dequantize(folder: Path) -> None:
    """The quantized tensors as AutoAWQ computes with them."""
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors import safe_open

    with safe_open(folder / "quantized.safetensors", framework="pt") as file:
        group_size = int(file.metadata()["group_size"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for linear in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        packed = [tensors[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales")]
        dense[f"{linear}.weight"] = dequantize_gemm(*packed, BITS, group_size).t().contiguous()
    save_file(dense, folder / "dense.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]), Path(sys.argv[5]))
    else:
        dequantize(Path(sys.argv[2]))
