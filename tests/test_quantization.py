"""The quantize stage on tiny models of every family, against transformers' own loader."""

import io
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from autoglm_compress.architecture import ModelShape, Quantization, family_of
from autoglm_compress.checkpoint import Checkpoint, CheckpointWriter
from autoglm_compress.errors import UserError
from autoglm_compress.progress import Progress
from autoglm_compress.quantization.rounding import quantize_symmetric
from autoglm_compress.quantization.smoothing import fold, smoothing_pairs
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
        origin=checkpoint,
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
