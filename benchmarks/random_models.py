"""What the benchmarks of time and memory share: random weights in the article's shape, and what a machine can do."""

import json
import time
from math import prod
from pathlib import Path

import torch
from chains import REFERENCE
from safetensors.torch import save_file
from transformers import AutoTokenizer, Glm4Config, GlmConfig, PreTrainedConfig

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.architecture.family import TEXT
from autoglm_compress.architecture.quantization import COMPRESSED_TENSORS
from autoglm_compress.checkpoint.compressed_tensors_format import pack, quantization_config, stored_shapes
from autoglm_compress.checkpoint.described import describe
from autoglm_compress.checkpoint.weight_files import INDEX

PEAK_SIZE = 4096


def article_config(
    layers: int,
    hidden_size: int = 4096,
    intermediate_size: int = 16_384,
    heads: int = 32,
    key_value_heads: int = 8,
    tied: bool = False,
    vocab_size: int = 151_552,
) -> GlmConfig:
    """The seed article's source, what becomes of it, or something smaller of its kind."""
    return GlmConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden_size // heads,
        attention_bias=True,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["GlmForCausalLM"],
    )


def phone_config(layers: int = 24) -> Glm4Config:
    """The text model of AutoGLM-Phone-9B cut to three quarters, with its two KV heads and an FFN that 128 divides."""
    return Glm4Config(
        vocab_size=151_552,
        hidden_size=3072,
        intermediate_size=10_240,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        pad_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["Glm4ForCausalLM"],
    )


def write_checkpoint(folder: Path, config: PreTrainedConfig, scheme: Scheme | None = None) -> ModelShape:
    """Random weights with the embedded model's tokenizer, a shard for each layer and for what stands outside them.

    Shards that are there are left, so a run that was killed goes on. The linears that write to the residual stream are
    scaled by (2 layers)^-1/2, as GPT-2's were at the start, so that it keeps its size through any number of layers.
    With a scheme, the integers and scales of the layers' linears are drawn, and nothing is quantized.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    shape = describe(folder).shape
    family = shape.family
    writers = (f"{family.attention_output}.weight", f"{family.mlp_output}.weight")
    sizes = dict(shape.tensors()) | {tensor.name: tensor.shape for tower in shape.kept for tensor in tower.tensors}
    schemes = dict.fromkeys((name for name, _ in shape.linear_shapes()), scheme) if scheme else {}
    if schemes:
        described = quantization_config(Quantization(COMPRESSED_TENSORS, schemes), family)
        settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": described}
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    shards: dict[object, dict[str, int]] = {}
    for number, name in enumerate(sizes):
        place = family.place(name)
        shard = (place.tower, name if place.tower == TEXT and place.layer is None else place.layer)
        shards.setdefault(shard, {})[name] = number
    index = {}
    for number, numbers in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for name in numbers:
            module = name.removesuffix(".weight")
            stored = stored_shapes(module, schemes[module], sizes[name]) if module in schemes else (name,)
            index |= dict.fromkeys(stored, file)
        if (folder / file).exists():
            continue
        tensors = {}
        for name, seed in numbers.items():
            scale = (2 * shape.num_hidden_layers) ** -0.5 if name.endswith(writers) else 1.0
            module = name.removesuffix(".weight")
            if module in schemes:
                tensors |= _random_integers(module, schemes[module], sizes[name], scale, seed)
            else:
                tensors[name] = _random(name, sizes[name], scale, seed)
        save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
        (folder / f"{file}.partial").rename(folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": shape.bytes}, "weight_map": index}))
    return shape


def _random(name: str, size: tuple[int, ...], scale: float, seed: int) -> torch.Tensor:
    """A tensor that keeps the size of its input: normal with variance scale^2 / inputs, gains 1, biases 0."""
    tensor = torch.empty(size, dtype=torch.bfloat16)
    if len(size) == 1:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    return tensor.normal_(0, scale * prod(size[1:]) ** -0.5, generator=torch.Generator().manual_seed(seed))


def _random_integers(
    module: str, scheme: Scheme, size: tuple[int, int], scale: float, seed: int
) -> dict[str, torch.Tensor]:
    """Integers of all values, and scales of both signs that differ by up to three times, of a weight like `_random`."""
    draw, most = torch.Generator().manual_seed(seed), 2 ** (scheme.bits - 1)
    integers = torch.randint(-most, most, size, dtype=torch.int8, generator=draw)
    scales = torch.rand(size[0], scheme.groups(size[1]), generator=draw) + 0.5
    scales *= 1 - 2 * torch.randint(2, scales.shape, generator=draw)
    scales *= scale * size[1] ** -0.5 * 3**0.5 / most
    return pack(module, scheme, integers, scales.bfloat16(), None)


def matmul_peak(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a large product here with the threads there are, the best of three."""
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE).to(dtype)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * PEAK_SIZE**3 / best / 1e9
