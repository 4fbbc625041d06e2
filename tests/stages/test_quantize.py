"""The quantize stage on tiny models of every family, against transformers' own loader."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autoglm_compress.architecture import Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ, COMPRESSED_TENSORS
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.errors import PlanError, UserError
from autoglm_compress.quantization.grid import Grid
from autoglm_compress.quantization.options import TowerOptions
from autoglm_compress.quantization.smoothing import fold, smoothing_pairs
from autoglm_compress.quantization.writing import LayerWriter
from autoglm_compress.stages.quantize import Quantize
from support.command_line import assert_says
from support.quantizing import (
    FAMILIES,
    LAYERS,
    contents,
    loaded_logits,
    logits,
    make_model,
    plain_model,
    relative,
    run_stage,
    shape_of,
)

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def as_grid(weight: torch.Tensor) -> Grid:
    """A grid of which all ones are the weight."""
    return Grid(8, weight, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_folding_does_not_change_the_model(tmp_path: Path, model_type: str):
    checkpoint = Checkpoint(make_model(tmp_path, model_type, dtype="float32"))
    model = plain_model(checkpoint)
    expected = logits(model)
    for layer in range(LAYERS):
        tensors = checkpoint.read_layer(layer)
        for pair in smoothing_pairs(checkpoint.shape):
            width = tensors[f"{pair.readers[0]}.weight"].shape[1] // pair.copies
            scale, producer = torch.empty(width).uniform_(0.2, 5), tensors[f"{pair.producer}.weight"]
            linear = producer.ndim == 2
            name = f"{pair.producer}.{'bias' if linear else 'weight'}"
            grid = as_grid(producer) if linear else None
            folded = fold(pair, scale, tensors.get(name), torch.float32, grid)
            tensors |= {} if folded.vector is None else {name: folded.vector}
            tensors |= {f"{pair.producer}.weight": folded.grid.scales} if linear else {}
            columns = pair.spread(folded.scale)
            tensors |= {f"{reader}.weight": tensors[f"{reader}.weight"] * columns for reader in pair.readers}
        assert all(
            not torch.equal(tensors[name], kept)
            for name, kept in checkpoint.read_layer(layer).items()
            if name.endswith("proj.weight")
        )
        model.model.layers[layer].load_state_dict(tensors)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# Planning


def test_plan_refuses_a_group_size_that_does_not_divide_and_says_which_do():
    shape = shape_of("llama", intermediate_size=96)
    with pytest.raises(PlanError, match=r"64 does not divide the 96 input features of mlp\.down_proj.*: 32, -1 ") as no:
        Quantize(stage="quantize", bits=4, group_size=64).plan(shape)
    assert no.value.option == "group_size"
    planned = Quantize(stage="quantize", bits=4, group_size=32).plan(shape)
    assert set(planned.quantization.schemes.values()) == {Scheme(4, 32)}
    assert planned.bytes < shape.bytes


def test_plan_refuses_what_no_group_divides():
    shape = shape_of("qwen3", intermediate_size=100)
    with pytest.raises(PlanError, match=r"100 input features of mlp\.down_proj.*: -1 \(-1 is one scale per output\)"):
        Quantize(stage="quantize", bits=4, group_size=32).plan(shape)
    planned = Quantize(stage="quantize", bits=4, group_size=-1).plan(shape)
    assert set(planned.quantization.schemes.values()) == {Scheme(4, -1)}


def test_plan_names_one_of_many_linears():
    with pytest.raises(PlanError, match=r"128 does not divide the 64 input features of .* and 5 more; .*: 64, 32, -1"):
        Quantize(stage="quantize", bits=4).plan(shape_of("llama"))


def test_plan_rejects_a_quantized_shape():
    stage = Quantize(stage="quantize", bits=8, group_size=32)
    with pytest.raises(PlanError, match="from:") as caught:
        stage.plan(stage.plan(shape_of("glm")))
    assert caught.value.option == "stage"


def test_what_some_loaders_do_not_take_is_warned_of():
    shape = shape_of("llama")
    [unpacked] = Quantize(stage="quantize", bits=4, towers={"vision": TowerOptions(bits=8)}).warnings(shape)
    assert_says(unpacked, "quantized towers", "generate", "call the model once")
    [warning] = Quantize(stage="quantize", bits=4, head_bits=8).warnings(shape)
    assert "head" in warning
    for options in ({"bits": 4}, {"bits": 4, "format": "awq"}, {"bits": 8, "symmetric": True}):
        assert Quantize(stage="quantize", **options).warnings(shape) == []


# The stage


def quantization_like(shape, scheme: Scheme, form: str = COMPRESSED_TENSORS) -> Quantization:
    return Quantization(form, {name: scheme for name, _ in shape.linear_shapes()})


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.3), (8, 0.025)])
def test_transformers_computes_what_we_wrote(tmp_path: Path, model_type: str, bits: int, limit: float):
    source = make_model(tmp_path / "source", model_type)
    run_stage(source, tmp_path, bits=bits, group_size=32)
    ours = Checkpoint(tmp_path / "target")
    assert ours.shape.quantization == quantization_like(ours.shape, Scheme(bits, 32))
    assert ours.shape.bytes == sum(info.nbytes for info in ours.infos.values())
    loaded = loaded_logits(tmp_path / "target")
    assert torch.equal(loaded, logits(plain_model(ours)))
    original = loaded_logits(source)
    assert relative(loaded - original, original) < limit


def written_linears(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The linears that stages will have written from now on, by their names in the model."""
    written = {}
    write = LayerWriter.write

    def spy(self, layer, quantized):
        prefix = self.source.family.layer_prefix(layer)
        written.update({prefix + name: linear for name, linear in quantized.linears.items()})
        return write(self, layer, quantized)

    monkeypatch.setattr(LayerWriter, "write", spy)
    return written


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("zero_points_load")
def test_peer_unpacks_our_integers(
    tmp_path: Path, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch, zero_points_load: None
):
    written = written_linears(monkeypatch)
    run_stage(make_model(tmp_path / "source", "qwen3"), tmp_path, bits=bits, group_size=64, symmetric=symmetric)
    target = Checkpoint(tmp_path / "target")
    assert written.keys() == {name for name, _ in target.shape.linear_shapes()}
    for module, linear in written.items():
        packed = target._read_stored(f"{module}.weight_packed")
        assert torch.equal(unpack_from_int32(packed, bits, linear.integers.shape), linear.integers)
        assert torch.equal(target._read_stored(f"{module}.weight_scale"), linear.grid.scales)
        assert torch.equal(target.read(f"{module}.weight"), linear.values(torch.bfloat16))
        assert (f"{module}.weight_zero_point" in target.infos) is not symmetric


@pytest.mark.parametrize(
    "options", [{"group_size": -1}, {"method": "round_to_nearest"}, {"error_feedback": False, "group_size": -1}]
)
def test_tied_and_per_channel_load(tmp_path: Path, options: dict):
    source = make_model(tmp_path / "source", "llama", tie_word_embeddings=True, intermediate_size=96)
    context = run_stage(source, tmp_path, **({"bits": 8, "group_size": 32} | options))
    ours = Checkpoint(tmp_path / "target")
    assert ours.family.head not in ours.infos
    assert ours.shape.quantization == context.shape.quantization
    read = logits(plain_model(ours))
    assert torch.equal(loaded_logits(tmp_path / "target"), read)
    original = loaded_logits(source)
    assert relative(read - original, original) < 0.03


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_asymmetric_compressed_tensors_loads_dequantized(tmp_path: Path, zero_points_load: None):
    from transformers import CompressedTensorsConfig

    run_stage(make_model(tmp_path / "source", "llama"), tmp_path, bits=4, group_size=32, symmetric=False)
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", quantization_config=config)
    assert torch.equal(logits(model), logits(plain_model(Checkpoint(tmp_path / "target"))))


@pytest.mark.parametrize("model_type", ["llama", "glm4"])
def test_each_step_lowers_the_error_where_channels_stand_out(tmp_path: Path, model_type: str):
    source = make_model(tmp_path / "source", model_type, outliers=True)
    original = loaded_logits(source)
    methods = {
        "rounding": {"method": "round_to_nearest"},
        "awq": {"error_feedback": False},
        "feedback": {"error_feedback": True},
    }
    errors, outputs = {}, {}
    for name, options in methods.items():
        context = run_stage(source, tmp_path / name, bits=4, group_size=32, **options)
        errors[name] = relative(logits(plain_model(Checkpoint(tmp_path / name / "target"))) - original, original)
        if name != "rounding":
            pairs = [pair for layer in context.decisions["layers"] for pair in layer["pairs"].values()]
            assert len(pairs) == 4 * LAYERS
            assert all(pair["error_ratio"] <= 1 for pair in pairs)
            outputs[name] = sum(pair["output_error"] for pair in pairs)
    assert errors["awq"] < errors["rounding"]
    assert errors["feedback"] < 0.6 * errors["rounding"]
    assert outputs["feedback"] < 0.5 * outputs["awq"]


def test_biases_and_norms_keep_their_dtype(tmp_path: Path):
    run_stage(make_model(tmp_path / "source", "llama"), tmp_path, bits=4, group_size=32)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "target")
    for name, info in before.infos.items():
        if name in after.infos:
            assert after.infos[name].dtype == info.dtype
    assert "model.layers.0.mlp.up_proj.bias" in after.infos
    assert after.infos["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


# awq


@pytest.mark.parametrize("model_type", ["llama", "glm"])
@pytest.mark.parametrize("options", [{}, {"method": "round_to_nearest"}, {"group_size": -1}], ids=str)
def test_awq_is_read_back_as_it_was_rounded(
    tmp_path: Path, model_type: str, options: dict, monkeypatch: pytest.MonkeyPatch
):
    written = written_linears(monkeypatch)
    source = make_model(tmp_path / "source", model_type)
    run_stage(source, tmp_path, **({"bits": 4, "group_size": 32, "format": "awq"} | options))
    target = Checkpoint(tmp_path / "target")
    scheme = Scheme(4, options.get("group_size", 32), symmetric=False)
    assert target.shape.quantization == quantization_like(target.shape, scheme, AWQ)
    assert target.shape.bytes == sum(info.nbytes for info in target.infos.values())
    for module, linear in written.items():
        assert linear.grid.scales.dtype == torch.float16
        assert torch.equal(target.read(f"{module}.weight"), linear.values(torch.float16).bfloat16())
    assert len(written) == len(target.shape.quantization.schemes)
    original = loaded_logits(source)
    assert relative(logits(plain_model(target)) - original, original) < 0.3


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="transformers loads awq checkpoints with gptqmodel")
def test_transformers_loads_awq(tmp_path: Path):
    source = make_model(tmp_path / "source", "llama", dtype="float16")
    run_stage(source, tmp_path, bits=4, group_size=32, format="awq")
    ours = logits(plain_model(Checkpoint(tmp_path / "target")))
    assert relative(loaded_logits(tmp_path / "target") - ours, ours) < 1e-2


def test_awq_as_others_write_it_is_read(tmp_path: Path):
    run_stage(make_model(tmp_path / "source", "llama"), tmp_path, bits=4, group_size=32, format="awq")
    target = tmp_path / "target"
    config = json.loads((target / "config.json").read_text())
    described = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}
    assert config["quantization_config"].items() >= described.items()
    config["quantization_config"] = described | {"modules_to_not_convert": None, "version": "GEMM"}
    read = Checkpoint(target).read("model.layers.0.mlp.up_proj.weight")
    (target / "config.json").write_text(json.dumps(config))
    assert torch.equal(Checkpoint(target).read("model.layers.0.mlp.up_proj.weight"), read)
    with pytest.raises(UserError, match=r"no tensor .*did you mean .*model\.layers\.0\.mlp\.up_proj\.weight"):
        Checkpoint(target).read("model.layers.0.mlp.up_prj.weight")
    with pytest.raises(UserError, match=r"no quantized linear 'lm_head'"):
        Checkpoint(target).read_integers("lm_head")


# Killed, or fed what it cannot take


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 4, "error_feedback": False},
        {"bits": 4, "method": "round_to_nearest"},
        {"bits": 4, "format": "awq"},
        {"bits": "auto", "budget": {"average_bits": 5.5}},
        {"bits": 8, "head_bits": 8},
    ],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch):
    source = make_model(tmp_path / "source", "glm", tie_word_embeddings=False)
    options = {"group_size": 32} | options
    whole = run_stage(source, tmp_path / "whole", **options)
    for killed_in, folder in ((1, tmp_path / "killed"), (2, tmp_path / "killed")):
        with monkeypatch.context() as patch:
            write = CheckpointWriter.write

            def die(self, number, tensors, killed_in=killed_in, write=write):
                if number == 1 + killed_in:
                    raise KilledError
                write(self, number, tensors)

            patch.setattr(CheckpointWriter, "write", die)
            with pytest.raises(KilledError):
                run_stage(source, folder, **options)
    for _ in range(2):  # the second time all is there
        resumed = run_stage(source, tmp_path / "killed", **options)
        assert contents(tmp_path / "killed/target") == contents(tmp_path / "whole/target")
        assert json.loads(json.dumps(resumed.decisions)) == whole.decisions
        assert resumed.shape == whole.shape


def test_inputs_that_are_not_finite_are_named(tmp_path: Path):
    source = make_model(tmp_path / "source", "llama")
    [file] = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.bias"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 1: the inputs of mlp\.down_proj are NaN or infinite"):
        run_stage(source, tmp_path, bits=4, group_size=32)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("feedback", [True, False])
def test_inputs_that_are_zero_for_all_tokens(tmp_path: Path, model_type: str, feedback: bool):
    """The gains of a norm, and the values of the heads of another layer."""
    source = make_model(tmp_path / "source", model_type)
    [file] = source.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.startswith(("model.layers.1.input_layernorm", "model.layers.2.self_attn.v_proj")):
            tensors[name].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    context = run_stage(source, tmp_path, bits=4, group_size=32, error_feedback=feedback)
    for layer, producer in ((1, "input_layernorm"), (2, "self_attn.v_proj")):
        error = context.decisions["layers"][layer]["pairs"][producer]["output_error"]
        assert 0 <= error < (0.02 if feedback else 1e-30)  # feedback counts its damping, which is all that there is
    original = loaded_logits(source)
    loaded = loaded_logits(tmp_path / "target")
    assert torch.equal(loaded, logits(plain_model(Checkpoint(tmp_path / "target"))))
    assert relative(loaded - original, original) < 0.3
