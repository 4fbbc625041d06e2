"""The stored layouts, against what the packages that made them up pack and unpack."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

from autoglm_compress.architecture import ModelShape, Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ, COMPRESSED_TENSORS
from autoglm_compress.checkpoint import Checkpoint, awq_format, compressed_tensors_format
from autoglm_compress.checkpoint.quantized_format import FORMATS, format_of
from autoglm_compress.errors import UserError
from autoglm_compress.quantization.bit_allocation import groups_of, with_bits
from autoglm_compress.quantization.grid import Grid, grid_for
from support.places import DATA
from support.quantizing import loaded_logits, logits, make_model, plain_model, run_stage, shape_of
from support.running import invoke

torch.set_num_threads(1)
AUTOAWQ = DATA / "autoawq_gemm.safetensors"
SCHEMES = [Scheme(bits, size, symmetric) for bits in (4, 8) for size in (32, -1) for symmetric in (True, False)]


def rounded(scheme: Scheme, dtype: torch.dtype, rows: int = 40, columns: int = 96) -> tuple[Grid, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0, :32], weight[1], weight[2] = 0, weight[1].abs(), -weight[2].abs()
    grid = grid_for(weight, scheme, dtype)
    integers = grid.integers(weight)
    lowest = -(2 ** (scheme.bits - 1))
    integers[3, :2] = torch.tensor([lowest, -lowest - 1])
    return grid, integers


# compressed-tensors


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compressed_tensors_unpacks_what_was_meant(scheme: Scheme, dtype: torch.dtype):
    grid, integers = rounded(scheme, dtype)
    stored = compressed_tensors_format.pack("x", scheme, integers, grid.scales, grid.zeros)
    state = {name.removeprefix("x."): tensor for name, tensor in stored.items()}
    assert torch.equal(unpack_from_int32(state["weight_packed"], scheme.bits, integers.shape), integers)
    assert ("weight_zero_point" in state) is not scheme.symmetric
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size == -1 else "group",
        group_size=None if scheme.group_size == -1 else scheme.group_size,
    )
    theirs = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))
    ours = compressed_tensors_format.dequantize("x", scheme, stored.__getitem__, dtype)
    assert theirs["weight"].dtype == ours.dtype == dtype
    assert torch.equal(theirs["weight"], ours)
    assert torch.equal(ours, grid.values(integers, dtype))
    if not scheme.symmetric:
        assert torch.equal(theirs["weight_zero_point"], grid.zeros)


@pytest.mark.parametrize(
    ("scheme", "rows", "columns"),
    [(scheme, 40, 96) for scheme in SCHEMES] + [(scheme, 36, 100) for scheme in SCHEMES if scheme.group_size == -1],
    ids=str,
)
def test_planned_bytes_are_those_stored(scheme: Scheme, rows: int, columns: int):
    weight = torch.randn(rows, columns)
    grid = grid_for(weight, scheme, torch.bfloat16)
    stored = compressed_tensors_format.pack("x", scheme, grid.integers(weight), grid.scales, grid.zeros)
    planned = Quantization(COMPRESSED_TENSORS, {"x": scheme}).matrix_bytes("x", (rows, columns), 2)
    assert planned == sum(tensor.nbytes for tensor in stored.values())


def every_linear(shape: ModelShape, scheme: Scheme) -> dict[str, Scheme]:
    return {name: scheme for name, _ in shape.linear_shapes()}


def mixed(shape: ModelShape, scheme: Scheme) -> Quantization:
    """Every third group of linears in 8 bits."""
    quantization, groups = Quantization(COMPRESSED_TENSORS, every_linear(shape, scheme)), groups_of(shape)
    return with_bits(quantization, groups, [8 if number % 3 == 0 else 4 for number in range(len(groups))])


def by_layer(shape: ModelShape) -> Quantization:
    """The first layer in 8 bits."""
    prefix = shape.family.layer_prefix(0)
    schemes = {name: Scheme(8 if name.startswith(prefix) else 4, 32) for name, _ in shape.linear_shapes()}
    return Quantization(COMPRESSED_TENSORS, schemes)


def uniform(shape: ModelShape, scheme: Scheme) -> Quantization:
    return Quantization(COMPRESSED_TENSORS, every_linear(shape, scheme))


QUANTIZATIONS: dict[str, Callable[[ModelShape], Quantization]] = {
    "4 bits": lambda shape: uniform(shape, Scheme(4, 32)),
    "asymmetric": lambda shape: uniform(shape, Scheme(4, 64, symmetric=False)),
    "per channel": lambda shape: uniform(shape, Scheme(8, -1)),
    "mixed": lambda shape: mixed(shape, Scheme(4, 32)),
    "mixed by layer": by_layer,
    "mixed, per channel": lambda shape: mixed(shape, Scheme(4, -1, symmetric=False)),
    "with a head": lambda shape: Quantization(
        COMPRESSED_TENSORS, mixed(shape, Scheme(4, 32)).schemes | {"lm_head": Scheme(8, -1)}
    ),
    "with a head like the rest": lambda shape: Quantization(
        COMPRESSED_TENSORS, every_linear(shape, Scheme(8, -1)) | {"lm_head": Scheme(8, -1)}
    ),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_a_config_says_how_each_linear_is_quantized(name: str, family: str):
    shape = shape_of(family, num_hidden_layers=12, tie_word_embeddings=False)
    quantization = QUANTIZATIONS[name](shape)
    described = json.loads(json.dumps(compressed_tensors_format.quantization_config(quantization, shape.family)))
    assert QuantizationConfig.model_validate(described)
    read = compressed_tensors_format.read_quantization(shape, described, "config.json")
    assert read == quantization
    assert format_of({"quantization_config": described}, "config.json") is FORMATS[COMPRESSED_TENSORS]


def described_by_others(**changes: object) -> dict:
    """As llm-compressor writes it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]} | changes


@pytest.mark.parametrize("ignore", [["lm_head"], ["re:.*lm_head"], ["re:lm_head$", "re:vision.*"]])
def test_what_is_ignored_is_not_quantized(ignore: list[str]):
    shape = shape_of("llama", tie_word_embeddings=False)
    read = compressed_tensors_format.read_quantization(shape, described_by_others(ignore=ignore), "config.json")
    assert read.schemes == every_linear(shape, Scheme(4, 32))


def test_a_head_that_is_not_ignored_is_quantized():
    described = described_by_others(ignore=[])
    for tied in (False, True):
        shape = shape_of("llama", tie_word_embeddings=tied)
        read = compressed_tensors_format.read_quantization(shape, described, "config.json")
        assert ("lm_head" in read.schemes) is not tied


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": {}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
        {"config_groups": {"group_0": {"targets": ["re:("], "weights": described_by_others()}}},
        {"config_groups": [1]},
    ],
    ids=str,
)
def test_a_linear_of_which_nothing_is_said(changes: dict):
    shape = shape_of("llama", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"config\.json: quantization_config\.config_groups does not say how model\."):
        compressed_tensors_format.read_quantization(shape, described_by_others(**changes), "config.json")


def test_ignored_linears_of_a_layer_are_read_as_transformers_reads_them(tmp_path: Path):
    """Two linears of one layer stay in 16 bits, as llm-compressor leaves them where it is told to ignore them."""
    source = Checkpoint(make_model(tmp_path / "source", "llama", tie_word_embeddings=False))
    run_stage(source.folder, tmp_path, bits=4, group_size=32)
    target, ignored = tmp_path / "target", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
    [file] = target.glob("*.safetensors")
    tensors = load_file(file)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in ignored}
    tensors |= {f"{name}.weight": source.read(f"{name}.weight") for name in ignored}
    tensors |= {f"{name}.bias": source.read(f"{name}.bias") for name in ignored if f"{name}.bias" in source.infos}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["ignore"] += ignored
    (target / "config.json").write_text(json.dumps(config))
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
    ours = Checkpoint(target)
    assert not set(ignored) & ours.shape.quantization.schemes.keys()
    assert ours.shape.bytes == sum(info.nbytes for info in ours.infos.values())
    assert torch.equal(loaded_logits(target), logits(plain_model(ours)))
    assert invoke("inspect", target).exit_code == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_an_int8_head_loads(tmp_path: Path, bits: int):
    source = make_model(tmp_path / "source", "qwen3", tie_word_embeddings=False)
    context = run_stage(source, tmp_path, bits=bits, group_size=32, head_bits=8)
    ours = Checkpoint(tmp_path / "target")
    assert "lm_head.weight" not in ours.infos
    assert ours.infos["lm_head.weight_packed"].shape == (101, 16)
    assert ours.shape.quantization == context.shape.quantization
    assert ours.shape.bytes == sum(info.nbytes for info in ours.infos.values())
    assert json.loads((tmp_path / "target/config.json").read_text())["quantization_config"]["ignore"] == []
    head, before = ours.head_weight().float(), Checkpoint(source).head_weight().float()
    step = before.abs().amax(1, keepdim=True) / 127.5
    assert ((head - before).abs() <= 0.505 * step + 2**-8 * before.abs()).all()  # scale and product are bf16
    assert torch.equal(loaded_logits(tmp_path / "target"), logits(plain_model(ours)))


# awq


def test_awq_packs_as_autoawq_does():
    # Made once with AutoAWQ 0.2.9: integers and zero points at random in [0, 15], scales as below; `qweight`, `qzeros`
    # and `scales` are what WQLinear_GEMM.from_linear made of the weight (integers - zeros) * scales in groups of 32,
    # `values` [in, out] what awq.utils.packing_utils.dequantize_gemm then gave.
    theirs, scheme = load_file(AUTOAWQ), Scheme(4, 32, symmetric=False)
    integers, zeros = theirs["integers"] - 8, theirs["zeros"] - 8
    ours = awq_format.pack("x", scheme, integers, theirs["scales"].T, zeros)
    assert ours.keys() == {"x.qweight", "x.qzeros", "x.scales"}
    for part in ("qweight", "qzeros", "scales"):
        assert ours[f"x.{part}"].dtype == theirs[part].dtype
        assert torch.equal(ours[f"x.{part}"], theirs[part])
    values = awq_format.dequantize("x", scheme, ours.__getitem__, torch.float16)
    assert torch.equal(values, theirs["values"].T)
    assert torch.equal(values, Grid(4, theirs["scales"].T, zeros).values(integers, torch.float16))
    assert torch.equal(awq_format.dequantize("x", scheme, ours.__getitem__, torch.bfloat16), values.bfloat16())


@pytest.mark.parametrize("size", [32, -1])
def test_awq_comes_back_as_it_was(size: int):
    scheme = Scheme(4, size, symmetric=False)
    grid, integers = rounded(scheme, torch.float16)
    stored = awq_format.pack("x", scheme, integers, grid.scales, grid.zeros)
    groups = scheme.groups(96)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "x.qweight": (96, 5),
        "x.qzeros": (groups, 5),
        "x.scales": (groups, 40),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert awq_format.stored_shapes("x", scheme, tuple(integers.shape)) == shapes
    values = awq_format.dequantize("x", scheme, stored.__getitem__, torch.float32)
    assert torch.equal(values, grid.values(integers, torch.float16).float())
    planned = Quantization(AWQ, {"x": scheme}).matrix_bytes("x", (40, 96), 2)
    assert planned == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("size", [32, -1])
def test_an_awq_config_is_read_back(size: int):
    shape = shape_of("glm", tie_word_embeddings=False)
    quantization = Quantization(AWQ, every_linear(shape, Scheme(4, size, symmetric=False)))
    described = json.loads(json.dumps(awq_format.quantization_config(quantization, shape.family)))
    assert awq_format.read_quantization(shape, described, "config.json") == quantization
    assert format_of({"quantization_config": described}, "config.json") is FORMATS[AWQ]
    as_autoawq = described | {"version": "GEMM", "modules_to_not_convert": None}
    assert awq_format.read_quantization(shape, as_autoawq, "config.json") == quantization


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"zero_point": False},
        {"version": "gemv"},
        {"version": None},
        {"group_size": None},
        {"modules_to_not_convert": ["mlp"]},
    ],
    ids=str,
)
def test_other_awq_layouts_are_refused(changes: dict):
    shape = shape_of("glm")
    described = awq_format.quantization_config(
        Quantization(AWQ, every_linear(shape, Scheme(4, 32, symmetric=False))), shape.family
    )
    with pytest.raises(UserError, match=r"config\.json: quantization_config: only the awq layout with bits 4"):
        awq_format.read_quantization(shape, described | changes, "config.json")


@pytest.mark.parametrize(
    ("described", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors float-quantized"),
        ({}, r"\{\}"),
        ("int4", "'int4'"),
        (["awq"], r"\['awq'\]"),
    ],
)
def test_other_formats_are_refused(described: object, shown: str):
    with pytest.raises(UserError, match=rf"config\.json: quantized as {shown}: only compressed-tensors pack-quantized"):
        format_of({"quantization_config": described}, "config.json")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_packed_tensors_of_another_shape_are_refused(tmp_path: Path, part: str):
    run_stage(make_model(tmp_path / "source", "llama"), tmp_path, bits=4, group_size=32, method="round_to_nearest")
    file = sorted((tmp_path / "target").glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(name)):
        Checkpoint(tmp_path / "target")
