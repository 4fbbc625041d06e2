"""Whether the installed transformers loads a compressed-tensors scheme, tested by loading a tiny model."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import nn

from autoglm_compress.architecture import Quantization, Scheme, family_of
from autoglm_compress.architecture.quantization import COMPRESSED_TENSORS
from autoglm_compress.checkpoint import compressed_tensors_format as packed
from autoglm_compress.quantization.grid import grid_for

WIDTH = 64
"""Two groups of inputs, and outputs that fill several packed integers."""


@cache
def transformers_loads(scheme: Scheme) -> bool:
    """Whether transformers loads linears of a scheme and computes the right values with them.

    Groups of half of the tiny model's width stand for groups of any size.
    """
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(8)[None]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), TemporaryDirectory() as folder:
        torch.manual_seed(0)
        expected = _write(Path(folder), scheme)(tokens).logits
        try:
            with _silence():
                found = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        except Exception:  # transformers and compressed-tensors raise many kinds
            return False
    return torch.allclose(found, expected, atol=1e-4)


def _write(folder: Path, scheme: Scheme) -> nn.Module:
    """Write a tiny model with linears of a scheme. Returns the model that loading should give."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scheme = Scheme(scheme.bits, -1 if scheme.group_size == -1 else WIDTH // 2, scheme.symmetric)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, linear in linears.items():
        weight = tensors.pop(f"{name}.weight")
        grid = grid_for(weight, scheme, torch.float32)
        stored = packed.pack(name, scheme, grid.integers(weight), grid.scales, grid.zeros)
        linear.weight.copy_(packed.dequantize(name, scheme, stored.__getitem__, torch.float32))
        tensors |= stored
    quantization = Quantization(COMPRESSED_TENSORS, dict.fromkeys(linears, scheme))
    config.quantization_config = packed.quantization_config(quantization, family_of(config.to_dict(), str(folder)))
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress progress bars and reports about the tiny model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
