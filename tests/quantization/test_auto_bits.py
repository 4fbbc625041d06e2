"""`bits: auto`: what 4 bits cost each group of linears, and a checkpoint that keeps to its budget."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoglm_compress.architecture import Scheme
from autoglm_compress.calibration.tokens import CalibrationOptions
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.errors import PlanError
from autoglm_compress.forward.one_layer_model import OneLayerModel
from autoglm_compress.quantization.bit_allocation import allocate, average_bits, checkpoint_bytes, groups_of
from autoglm_compress.quantization.bit_choice import uniform
from autoglm_compress.quantization.grid import clipped_grid
from autoglm_compress.quantization.sensitivity import SAMPLE_TOKENS, STREAMS, divergences, stream_bytes
from autoglm_compress.stages.quantize import Quantize
from support.quantizing import (
    LAYERS,
    batches,
    context_for,
    loaded_logits,
    logits,
    make_model,
    plain_model,
    run_stage,
    shape_of,
)
from support.running import Kill, digests, half_written, just_written, run, run_until_killed, write_recipe

torch.set_num_threads(1)
GROUPS = 4 * LAYERS


def auto(**options) -> Quantize:
    return Quantize(stage="quantize", bits="auto", **({"group_size": 32} | options))


@pytest.fixture(scope="module", params=["qwen3", "glm"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer is easy to round, and whose predictions rounding changes."""
    folder = make_model(tmp_path_factory.mktemp("source") / request.param, request.param, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.1.") and name.endswith("proj.weight"):
            parameter.data *= 0.02
    model.save_pretrained(folder)
    return folder


def stored_bytes(folder: Path) -> int:
    return sum(info.nbytes for info in Checkpoint(folder).infos.values())


# Planning


def test_plan_keeps_to_a_budget():
    shape = shape_of("qwen3")
    four, eight = (Quantize(stage="quantize", bits=bits, group_size=32).plan(shape) for bits in (4, 8))
    for budget in (four.bytes, four.bytes + 1, (four.bytes + eight.bytes) // 2, eight.bytes - 1):
        planned = auto(budget={"bytes": budget}).plan(shape)
        assert four.bytes <= planned.bytes <= budget
    for enough in (eight.bytes, 10 * eight.bytes):
        assert auto(budget={"bytes": enough}).plan(shape) == eight
    for bits in (4, 4.1, 5, 6.5, 7.99, 8):
        planned = auto(budget={"average_bits": bits}).plan(shape)
        assert average_bits(shape, planned.quantization.schemes) <= bits
    assert auto(budget={"average_bits": 4}).plan(shape) == four
    assert auto(budget={"average_bits": 8}).plan(shape) == eight


@pytest.mark.parametrize("options", [{}, {"group_size": -1}, {"head_bits": 8}], ids=str)
def test_plan_refuses_a_budget_that_is_too_small_and_names_the_least(options: dict):
    shape = shape_of("qwen3", tie_word_embeddings=False)
    least = Quantize(stage="quantize", bits=4, **({"group_size": 32} | options)).plan(shape).bytes
    auto(budget={"bytes": least}, **options).plan(shape)
    with pytest.raises(PlanError, match=f"too small: with 4 bits everywhere the checkpoint has {least} bytes") as no:
        auto(budget={"bytes": least - 1}, **options).plan(shape)
    assert no.value.option == "budget"


def test_a_budget_counts_the_head():
    shape = shape_of("qwen3", tie_word_embeddings=False)
    least = Quantize(stage="quantize", bits=4, group_size=32, head_bits=8).plan(shape).bytes
    assert least < Quantize(stage="quantize", bits=4, group_size=32).plan(shape).bytes
    planned = auto(budget={"bytes": least + 5000}, head_bits=8).plan(shape)
    assert least < planned.bytes <= least + 5000
    assert planned.quantization.schemes["lm_head"] == Scheme(8, -1)


# What 4 bits cost


def test_measuring_goes_on_at_the_layer_it_had_reached(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    context = context_for(auto(budget={"average_bits": 6}), source, tmp_path)
    shape = context.source.shape
    quantization = uniform(auto(budget={"average_bits": 6}), shape)
    arguments = (context.source, quantization, groups_of(shape), batches(), context.runtime)
    whole = divergences(*arguments, tmp_path / "whole/found.json")
    load, loaded, stop_at = OneLayerModel.load, [], 2 * LAYERS

    def stopping(self, layer):
        loaded.append(layer)
        if len(loaded) == stop_at:
            raise KeyboardInterrupt
        return load(self, layer)

    monkeypatch.setattr(OneLayerModel, "load", stopping)
    with pytest.raises(KeyboardInterrupt):
        divergences(*arguments, tmp_path / "stopped/found.json")
    loaded.clear()
    assert divergences(*arguments, tmp_path / "stopped/found.json") == whole
    assert loaded == [LAYERS - 1]


@torch.no_grad()
def test_what_4_bits_cost_is_measured_one_group_at_a_time(source: Path, tmp_path: Path):
    stage = auto(budget={"average_bits": 6})
    context = context_for(stage, source, tmp_path)
    checkpoint = context.source
    quantization, groups = uniform(stage, checkpoint.shape), groups_of(checkpoint.shape)
    arguments = (checkpoint, quantization, groups, batches(), context.runtime)
    found = divergences(*arguments, tmp_path / "found.json")
    assert len(found) == GROUPS
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.cat(batches())
    expected = model(tokens).logits.log_softmax(-1)
    for group, cost in zip(groups, found, strict=True):
        kept = {}
        for name in group.linears:
            linear = model.get_submodule(name)
            kept[name] = linear.weight.data
            grid = clipped_grid(linear.weight, Scheme(4, 32), torch.bfloat16, torch.ones(linear.in_features))
            linear.weight.data = grid.rounded(linear.weight)
        changed = model(tokens).logits.log_softmax(-1)
        explicit = (expected.exp() * (expected - changed)).sum(-1).mean()
        assert cost == pytest.approx(float(explicit), rel=0.02, abs=1e-6)
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
    (tmp_path / "found.json").write_text(json.dumps([1.5] * GROUPS))
    assert divergences(*arguments, tmp_path / "found.json") == [1.5] * GROUPS


@torch.no_grad()
def test_the_disk_that_measuring_takes_is_planned(source: Path, tmp_path: Path):
    stage = auto(budget={"average_bits": 6})
    context = context_for(stage, source, tmp_path)
    shape = context.source.shape
    rows = [torch.zeros(1, SAMPLE_TOKENS, dtype=torch.long)]
    arguments = (context.source, uniform(stage, shape), groups_of(shape), rows, context.runtime)
    divergences(*arguments, tmp_path / "found.json")
    kept = (tmp_path / "found" / STREAMS).stat().st_size
    assert kept == pytest.approx(stream_bytes(shape, GROUPS), rel=0.01)
    assert stage.needs(shape, shape, CalibrationOptions(samples=1, sequence_length=2)).scratch == 2 * stream_bytes(
        shape, GROUPS
    )


# The stage


@pytest.mark.parametrize("options", [{}, {"method": "round_to_nearest"}, {"head_bits": 8, "group_size": -1}], ids=str)
def test_mixed_bits_keep_to_a_budget_of_bytes_and_load(source: Path, tmp_path: Path, options: dict):
    shape, options = Checkpoint(source).shape, {"group_size": 32} | options
    four, eight = (Quantize(stage="quantize", bits=bits, **options).plan(shape).bytes for bits in (4, 8))
    budget = (2 * four + eight) // 3
    context = run_stage(source, tmp_path, bits="auto", budget={"bytes": budget}, **options)
    assert four < stored_bytes(tmp_path / "target") == context.shape.bytes <= budget
    ours = Checkpoint(tmp_path / "target")
    assert ours.shape.quantization == context.shape.quantization
    assert ours.shape.bytes == context.shape.bytes
    assert {scheme.bits for name, scheme in ours.shape.quantization.schemes.items() if name != "lm_head"} == {4, 8}
    assert torch.equal(loaded_logits(tmp_path / "target"), logits(plain_model(ours)))


def test_mixed_bits_keep_to_an_average_and_lie_between(source: Path, tmp_path: Path):
    kl = {}
    for bits, options in {4: {"bits": 4}, 8: {"bits": 8}, 6: {"bits": "auto", "budget": {"average_bits": 6}}}.items():
        context = run_stage(source, tmp_path / str(bits), group_size=32, **options)
        kl[bits] = context.decisions["agreement"]["kl_divergence"]
    assert kl[8] < kl[6] < kl[4]
    shape, decisions = Checkpoint(tmp_path / "6/target").shape, context.decisions
    assert average_bits(shape, shape.quantization.schemes) == decisions["average_bits"] <= 6
    chosen = decisions["bits"]
    assert [entry["bits"] for entry in chosen] == [
        shape.quantization.schemes[entry["linears"][0]].bits for entry in chosen
    ]
    assert all(entry["divergence_at_4_bits"] >= 0 for entry in chosen)
    for group, entry in zip(groups_of(shape), chosen, strict=True):
        assert list(group.linears) == entry["linears"]
        assert len({shape.quantization.schemes[name] for name in group.linears}) == 1
    easy = [entry for entry in chosen if ".layers.1." in entry["linears"][0]]
    assert max(entry["divergence_at_4_bits"] for entry in easy) < max(entry["divergence_at_4_bits"] for entry in chosen)
    assert torch.equal(loaded_logits(tmp_path / "6/target"), logits(plain_model(Checkpoint(tmp_path / "6/target"))))


def test_the_bits_are_those_that_cost_least(source: Path, tmp_path: Path):
    context = run_stage(source, tmp_path, bits="auto", group_size=32, budget={"average_bits": 6})
    costs = json.loads((tmp_path / "work/sensitivity.json").read_text())
    shapes = dict(context.source.shape.linear_shapes())
    sizes = [4 * sum(shapes[n][0] * shapes[n][1] for n in group.linears) for group in groups_of(context.source.shape)]
    expected = allocate(costs, sizes, sum(sizes) // 2)
    assert [entry["bits"] == 8 for entry in context.decisions["bits"]] == expected


@pytest.mark.parametrize(("average", "bits"), [(4, 4), (8, 8)])
def test_the_ends_of_the_budget_are_4_and_8_bits(tmp_path: Path, average: int, bits: int):
    source = make_model(tmp_path / "source", "qwen3")
    run_stage(source, tmp_path / "auto", bits="auto", group_size=32, budget={"average_bits": average})
    run_stage(source, tmp_path / "all", bits=bits, group_size=32)
    one, other = Checkpoint(tmp_path / "auto/target"), Checkpoint(tmp_path / "all/target")
    assert one.config == other.config
    assert one.shape == other.shape
    assert checkpoint_bytes(one.shape, one.shape.quantization) == stored_bytes(tmp_path / "auto/target")
    for name in one.infos:
        assert torch.equal(one._read_stored(name), other._read_stored(name))


@pytest.mark.parametrize(
    "kill", [half_written("sensitivity.json"), just_written("streams.safetensors"), just_written("unit-00002")], ids=str
)
def test_a_killed_run_decides_the_same(kill: Kill, make_checkpoint: Callable[..., Path], tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"This is about the number {number}." for number in range(300)))
    calibration = {"source": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 32}
    stage = {"stage": "quantize", "bits": "auto", "group_size": 32, "budget": {"average_bits": 5.5}}
    whole, killed = (
        write_recipe(tmp_path / name, make_checkpoint("glm"), [stage], calibration=calibration, evaluation={})
        for name in ("whole", "killed")
    )
    run(whole)
    assert run_until_killed(killed, kill)
    run(killed)
    assert digests(tmp_path / "killed/out") == digests(tmp_path / "whole/out")
    records = [json.loads((tmp_path / name / "out/01-quantize/stage.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["decisions"] == records[1]["decisions"]
    assert records[0]["shape"] == records[1]["shape"]
    assert 4 < records[0]["decisions"]["average_bits"] <= 5.5
