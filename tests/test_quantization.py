"""Rounding, the AWQ scale search, exact folding, and the quantize stage against transformers' own loader."""

import io
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from autoglm_compress.architecture import ModelShape, Quantization, family_of
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress
from autoglm_compress.quantization.awq import InputStatistics, sampled_rows, search_scale
from autoglm_compress.quantization.rounding import dequantize, quantize_symmetric, round_to_scales
from autoglm_compress.quantization.smoothing import Pair, fold, smoothing_pairs
from autoglm_compress.reconstruction.lineage import Lineage
from autoglm_compress.stages import quantize as quantize_module
from autoglm_compress.stages.base import PlanError, StageContext
from autoglm_compress.stages.quantize import AwqVisitor, Quantize

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
LAYERS = 3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": LAYERS,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
}


def make_model(folder: Path, model_type: str, outliers: bool = False, seed: int = 0, **changes) -> Path:
    """A tiny random model with biases and uneven norm gains.

    `outliers` makes every 32nd channel that linears read 30 times larger, in a model that is otherwise well-behaved:
    small weights, so that errors add up instead of being amplified.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | {"dtype": "bfloat16"} | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
            if outliers and name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter.data[::32] *= 30
        else:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.01 if outliers else 0.1)
    model.to(config.dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (2, 32), generator=generator) for _ in range(count)]


def context_for(stage: Quantize, source: Path, folder: Path) -> StageContext:
    checkpoint = Checkpoint(source)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return StageContext(
        source=checkpoint,
        target=CheckpointWriter(folder / "target", LAYERS + 2),
        shape=stage.plan(checkpoint.shape),
        lineage=Lineage.of_source(checkpoint.shape),
        statistics=lambda: pytest.fail("quantize needs no statistics"),
        calibration_batches=batches,
        device=torch.device("cpu"),
        seed=0,
        progress=Progress(Console(file=io.StringIO())),
        work=folder / "work",
        evaluate=lambda *_: pytest.fail("quantize evaluates nothing"),
    )


def run_stage(source: Path, folder: Path, **options) -> StageContext:
    stage = Quantize(stage="quantize", **options)
    context = context_for(stage, source, folder)
    stage.run(context)
    return context


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(batches(1)[0]).logits.float()


def plain_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """An unquantized transformers model with every tensor as our reader gives it."""
    config = checkpoint.model_config
    config.quantization_config = None
    model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)
    state = {name: checkpoint.read(name) for name, _ in checkpoint.shape.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if checkpoint.shape.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.norm() / reference.norm())


# Rounding


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A weight with rows of very different sizes, some zero groups, some outliers; and a group size."""
    group = draw(st.sampled_from([32, 64, -1]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(draw(st.integers(1, 5)), 128) * 10 ** draw(st.floats(-4, 1))
    if draw(st.booleans()):
        weight[0, :64] = 0
    if draw(st.booleans()):
        weight[:, 70] *= 1000
    return weight, group


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BITS = st.sampled_from([4, 8])


@given(weights(), BITS, DTYPES)
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_at_most_half_a_step(case: tuple[torch.Tensor, int], bits: int, dtype: torch.dtype):
    weight, group = case
    integers, scales = quantize_symmetric(weight, bits, group, dtype)
    assert scales.dtype == dtype
    assert integers.min() >= -(2 ** (bits - 1))
    assert integers.max() <= 2 ** (bits - 1) - 1
    error = (dequantize(integers, scales, torch.float32) - weight).abs()
    step = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    # Scales rounded down leave the largest value beyond the last step, by its share of the scale's rounding (the
    # smallest fp16 numbers round by whole subnormals).
    rounding = torch.finfo(dtype).eps * step + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= step / 2 + 2 ** (bits - 1) * rounding + 1e-6 * weight.abs()).all()


@given(weights(), BITS, DTYPES)
@settings(max_examples=40, deadline=None)
def test_rounded_weights_stay_where_they_are(case: tuple[torch.Tensor, int], bits: int, dtype: torch.dtype):
    weight, group = case
    integers, scales = quantize_symmetric(weight, bits, group, dtype)
    for computed_in in (torch.float32, dtype):
        again = round_to_scales(dequantize(integers, scales, computed_in).float(), scales, bits)
        assert torch.equal(again, integers)


@pytest.mark.parametrize("group", [2, -1])
def test_rounding_is_what_a_loop_over_values_gives(group: int):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize_symmetric(weight, 4, group, torch.bfloat16)
    width = 8 if group == -1 else group
    for row in range(3):
        for column in range(8):
            members = weight[row, column // width * width :][:width]
            scale = (members.abs().max() / 7.5).bfloat16()
            assert scales[row, column // width] == scale
            assert integers[row, column] == min(max(round(float(weight[row, column] / scale)), -8), 7)


def test_zero_rows_stay_zero():
    integers, scales = quantize_symmetric(torch.zeros(2, 64), 4, 32, torch.float16)
    assert not integers.any()
    assert torch.equal(scales, torch.ones(2, 2, dtype=torch.float16))


# The scale search


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], torch.device("cpu"))
    for part in inputs.split(50):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("block", [24, 1024])
def test_output_error_is_the_change_of_the_outputs(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr("autoglm_compress.quantization.awq.BLOCK", block)
    torch.manual_seed(0)
    inputs, weight = torch.randn(300, 64) + 0.3, torch.randn(40, 64)
    statistics = statistics_of(inputs)
    delta = dequantize(*quantize_symmetric(weight, 4, 32, torch.float32), torch.float32) - weight
    explicit = (inputs @ delta.T).square().sum()
    torch.testing.assert_close(statistics.output_error(delta), explicit, rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics.absolute, inputs.abs().sum(0))


@pytest.mark.parametrize(("rows", "kept"), [(16, 16), (128, 64), (512, 64), (2048, 256), (4096, 512), (27392, 517)])
def test_sampled_rows_cover_the_matrix(rows: int, kept: int):
    sample = sampled_rows(torch.arange(rows).unsqueeze(1))
    assert sample.shape == (kept, 1)
    assert sample[-1] >= rows - rows // 64 - 1


@pytest.mark.parametrize("group", [32, -1])
def test_search_beats_plain_rounding_where_channels_stand_out(group: int):
    torch.manual_seed(0)
    inputs = torch.randn(500, 128)
    inputs[:, ::20] *= 30
    readers = [torch.randn(96, 128), torch.randn(32, 128)]
    pair = Pair("norm", ("a", "b"))
    choice = search_scale(readers, statistics_of(inputs), pair, bits=4, group_size=group, dtype=torch.bfloat16)
    assert choice.error < 0.7 * choice.error_rounding

    def explicit(scale: torch.Tensor) -> float:
        error = size = 0.0
        for weight in readers:
            rounded = dequantize(*quantize_symmetric(weight * scale, 4, group, torch.bfloat16), torch.float32) / scale
            error += float((inputs @ sampled_rows(rounded - weight).T).square().sum())
            size += float((inputs @ sampled_rows(weight).T).square().sum())
        return error / size

    assert choice.error == pytest.approx(explicit(choice.candidate.scale), rel=1e-3)
    assert choice.error_rounding == pytest.approx(explicit(torch.ones(128)), rel=1e-3)


def test_search_survives_dead_channels_and_zero_weights():
    inputs = torch.randn(100, 64)
    inputs[:, :8] = 0
    pair = Pair("norm", ("a",))
    for weight in (torch.randn(64, 64), torch.zeros(64, 64)):
        choice = search_scale([weight], statistics_of(inputs), pair, bits=4, group_size=32, dtype=torch.bfloat16)
        assert choice.candidate.scale.isfinite().all()
        assert choice.error <= choice.error_rounding


def test_scales_are_shared_by_the_query_heads_that_read_a_value_head():
    pair = Pair("v", ("o",), copies=2, block=3)
    per_query = torch.arange(12.0)
    assert pair.averaged(per_query).tolist() == [1.5, 2.5, 3.5, 7.5, 8.5, 9.5]
    assert pair.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


# Folding


@pytest.mark.parametrize("model_type", FAMILIES)
def test_folding_does_not_change_the_model(tmp_path: Path, model_type: str):
    checkpoint = Checkpoint(make_model(tmp_path, model_type, dtype="float32"))
    model = plain_model(checkpoint)
    expected = logits(model)
    for layer in range(LAYERS):
        tensors = checkpoint.read_layer(layer)
        for pair in smoothing_pairs(checkpoint.shape):
            width = tensors[f"{pair.readers[0]}.weight"].shape[1] // pair.copies
            scale = torch.empty(width).uniform_(0.2, 5)
            tensors |= fold(tensors, pair, scale, dict.fromkeys(tensors, torch.float32))
        assert all(
            not torch.equal(tensors[name], kept)
            for name, kept in checkpoint.read_layer(layer).items()
            if name.endswith("proj.weight")
        )
        model.model.layers[layer].load_state_dict(tensors)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_folding_is_exact_for_the_gain_as_stored():
    torch.manual_seed(0)
    gain, weight = torch.randn(32).bfloat16().float(), torch.randn(8, 32)
    gain[3] = 0
    tensors = {"norm.weight": gain.clone(), "q.weight": weight.clone()}
    scale = torch.empty(32).uniform_(0.2, 5)
    folded = fold(tensors, Pair("norm", ("q",)), scale, {"norm.weight": torch.bfloat16})
    assert torch.equal(folded["norm.weight"], folded["norm.weight"].bfloat16().float())
    torch.testing.assert_close(folded["norm.weight"] * folded["q.weight"], gain * weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(folded["q.weight"], weight * scale, rtol=2**-8, atol=0)
    assert torch.equal(tensors["q.weight"], weight)


def test_folding_keeps_a_gain_that_would_leave_the_stored_range():
    tensors = {"norm.weight": torch.tensor([1e-6, 1.0, 6e4]), "q.weight": torch.ones(1, 3)}
    folded = fold(tensors, Pair("norm", ("q",)), torch.tensor([1e4, 2.0, 0.1]), {"norm.weight": torch.float16})
    assert folded["norm.weight"].tolist() == pytest.approx([1e-6, 0.5, 6e4])
    assert folded["q.weight"].tolist() == [[1.0, 2.0, 1.0]]


# Planning


def shape_of(model_type: str, **changes) -> ModelShape:
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | changes))
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return ModelShape.of(family_of(config.to_dict(), "test"), config)


def test_plan_takes_a_smaller_group_where_needed_and_says_so():
    shape = shape_of("llama", intermediate_size=96)
    stage = Quantize(stage="quantize", bits=4, group_size=64)
    planned = stage.plan(shape)
    assert planned.quantization.group_size("mlp.down_proj") == 32
    assert planned.quantization.group_size("mlp.up_proj") == 64
    assert planned.bytes < shape.bytes
    assert [warning.split(":")[0] for warning in stage.warnings(shape)] == ["mlp.down_proj"]


def test_plan_rejects_what_no_group_divides():
    shape = shape_of("qwen3", intermediate_size=100)
    with pytest.raises(PlanError, match=r"mlp\.down_proj has 100 input features.*use -1") as caught:
        Quantize(stage="quantize", bits=4).plan(shape)
    assert caught.value.option == "group_size"
    assert Quantize(stage="quantize", bits=4, group_size=-1).plan(shape).quantization.group_size("mlp.down_proj") == -1


def test_plan_rejects_a_quantized_shape():
    stage = Quantize(stage="quantize", bits=8)
    with pytest.raises(PlanError, match="from:") as caught:
        stage.plan(stage.plan(shape_of("glm")))
    assert caught.value.option == "stage"


# The stage


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.3), (8, 0.025)])
def test_transformers_computes_what_we_wrote(tmp_path: Path, model_type: str, bits: int, limit: float):
    source = make_model(tmp_path / "source", model_type)
    run_stage(source, tmp_path, bits=bits, group_size=32)
    ours = Checkpoint(tmp_path / "target")
    assert ours.shape.quantization == Quantization(bits, tuple((n, 32) for n in sorted(ours.family.layer_linears)))
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    assert torch.equal(loaded, logits(plain_model(ours)))
    original = logits(AutoModelForCausalLM.from_pretrained(source))
    assert relative(loaded - original, original) < limit


@pytest.mark.parametrize("bits", [4, 8])
def test_peer_unpacks_our_integers(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch):
    written = []

    def spy(weight, *args):
        result = quantize_symmetric(weight, *args)
        written.append(result[0])
        return result

    monkeypatch.setattr(quantize_module, "quantize_symmetric", spy)
    run_stage(make_model(tmp_path / "source", "qwen3"), tmp_path, bits=bits, group_size=64)
    target = Checkpoint(tmp_path / "target")
    names = [name for name in target.shape.layer_tensors() if name.endswith("proj.weight")]
    assert len(written) == LAYERS * len(names)
    for number, integers in enumerate(written):
        layer, index = divmod(number, len(names))
        module = target.family.layer_prefix(layer) + names[index].removesuffix(".weight")
        packed = target._read_stored(f"{module}.weight_packed")
        assert torch.equal(unpack_from_int32(packed, bits, integers.shape), integers)


@pytest.mark.parametrize("options", [{"group_size": -1}, {"group_size": 64}, {"method": "round_to_nearest"}])
def test_tied_per_channel_and_mixed_group_sizes_load(tmp_path: Path, options: dict):
    source = make_model(tmp_path / "source", "llama", tie_word_embeddings=True, intermediate_size=96)
    context = run_stage(source, tmp_path, bits=8, **options)
    ours = Checkpoint(tmp_path / "target")
    assert ours.family.head not in ours.infos
    assert ours.shape.quantization == context.shape.quantization
    read = logits(plain_model(ours))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "target")), read)
    original = logits(AutoModelForCausalLM.from_pretrained(source))
    assert relative(read - original, original) < 0.03


@pytest.mark.parametrize("model_type", ["llama", "glm4"])
def test_awq_beats_rounding_where_channels_stand_out(tmp_path: Path, model_type: str):
    source = make_model(tmp_path / "source", model_type, outliers=True)
    original = logits(AutoModelForCausalLM.from_pretrained(source))
    errors = {}
    for method in ("awq", "round_to_nearest"):
        context = run_stage(source, tmp_path / method, bits=4, group_size=32, method=method)
        errors[method] = relative(logits(plain_model(Checkpoint(tmp_path / method / "target"))) - original, original)
        if method == "awq":
            pairs = [pair for layer in context.decisions["layers"] for pair in layer["pairs"].values()]
            assert len(pairs) == 4 * LAYERS
            assert all(pair["error_ratio"] <= 1 for pair in pairs)
    assert errors["awq"] < 0.9 * errors["round_to_nearest"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("method", ["awq", "round_to_nearest"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch):
    source = make_model(tmp_path / "source", "glm")
    whole = run_stage(source, tmp_path / "whole", bits=4, group_size=32, method=method)
    for killed_in, folder in ((1, tmp_path / "killed"), (2, tmp_path / "killed")):
        with monkeypatch.context() as patch:
            write = CheckpointWriter.write

            def die(self, number, tensors, killed_in=killed_in, write=write):
                if number == 1 + killed_in:
                    raise KilledError
                write(self, number, tensors)

            patch.setattr(CheckpointWriter, "write", die)
            with pytest.raises(KilledError):
                run_stage(source, folder, bits=4, group_size=32, method=method)
    resumed = run_stage(source, tmp_path / "killed", bits=4, group_size=32, method=method)
    assert contents(tmp_path / "killed/target") == contents(tmp_path / "whole/target")
    assert json.loads(json.dumps(resumed.decisions)) == whole.decisions
    again = run_stage(source, tmp_path / "killed", bits=4, group_size=32, method=method)
    assert again.decisions == whole.decisions
    assert contents(tmp_path / "killed/target") == contents(tmp_path / "whole/target")


def test_inputs_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_model(tmp_path / "source", "llama")
    enter = AwqVisitor.enter

    def overflow(self, layer, module):
        enter(self, layer, module)
        if layer == 1:
            module.mlp.up_proj.weight.fill_(float("inf"))

    monkeypatch.setattr(AwqVisitor, "enter", overflow)
    with pytest.raises(UserError, match=r"layer 1: the inputs of mlp\.down_proj are NaN or infinite"):
        run_stage(source, tmp_path, bits=4, group_size=32)


def test_biases_and_norms_keep_their_dtype(tmp_path: Path):
    run_stage(make_model(tmp_path / "source", "llama"), tmp_path, bits=4, group_size=32)
    before, after = Checkpoint(tmp_path / "source"), Checkpoint(tmp_path / "target")
    for name, info in before.infos.items():
        if name in after.infos:
            assert after.infos[name].dtype == info.dtype
    assert "model.layers.0.mlp.up_proj.bias" in after.infos
    assert after.infos["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
