"""Every family with towers beside the text through the stages: what comes out sees and hears as its source does."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.training_rows import TextPart
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.forward.whole_model import load_model
from autoglm_compress.healing.teacher_samples import continued
from support.command_line import assert_says, refusal
from support.multimodal import (
    FAMILIES,
    INT8,
    family_of,
    load,
    logits,
    media_rows,
    save,
    stages_of,
    text_row,
)
from support.quiet import quiet
from support.running import invoke, run, tensors_of, write_recipe

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(name, tmp_path_factory.mktemp(name), tokenizer)


@pytest.fixture(scope="module")
def output(name: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("chain"), source, stages_of(name))
    run(recipe)
    (recipe.parent / "plan.json").write_text(invoke("plan", recipe, "--json").output)
    return recipe.parent / "out"


def made(output: Path) -> list[Path]:
    return sorted(file.parent for file in output.glob("[0-9][0-9]-*/config.json"))


def towers_of(name: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    prefixes = tuple(family_of(name).kept.values())
    return {tensor: value for tensor, value in tensors_of(checkpoint).items() if tensor.startswith(prefixes)}


def test_every_checkpoint_loads_and_answers_text_and_media(name: str, source: Path, output: Path):
    checkpoints = made(output)
    assert len(checkpoints) == len(stages_of(name)) - 1  # evaluate makes none
    for checkpoint in checkpoints:
        model = load(checkpoint)
        assert type(model).__name__ == FAMILIES[name].architecture
        assert logits(model, text_row()).isfinite().all()
        for row, other in zip(media_rows(name), media_rows(name, seed=1), strict=True):
            answer = logits(model, row)
            assert answer.isfinite().all()
            # The tower ran: another image or sound gives another answer.
            assert (answer - logits(model, other)).abs().max() > 1e-3


def test_towers_stay_bit_for_bit_but_for_bridges_after_a_cut_of_the_width(name: str, source: Path, output: Path):
    before, bridge = towers_of(name, source), family_of(name).bridge
    narrow = False
    for checkpoint in made(output):
        narrow |= checkpoint.name.endswith("-width")
        after = towers_of(name, checkpoint)
        assert before.keys() == after.keys()
        changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
        assert changed == ({tensor for tensor in before if bridge(tensor)} if narrow else set()), checkpoint.name


def test_sizes_are_those_of_the_plan(name: str, output: Path):
    planned = {entry["name"]: entry for entry in json.loads((output.parent / "plan.json").read_text())["checkpoints"]}
    for checkpoint in made(output):
        stored = tensors_of(checkpoint).values()
        assert planned[checkpoint.name]["bytes"] == sum(tensor.nbytes for tensor in stored), checkpoint.name


def test_a_stage_that_keeps_all_changes_no_answer(name: str, source: Path, output: Path):
    before, after = load(source), load(output / "01-same")
    for row in (text_row(), *media_rows(name)):
        assert torch.equal(logits(before, row), logits(after, row))


def test_dropping_layers_is_passing_the_stream_on_for_media_too(name: str, source: Path, output: Path):
    kept = json.loads((output / "02-depth" / "stage.json").read_text())["decisions"]["kept_layers"]
    [gone] = set(range(4)) - set(kept)
    reference, result = load(source), load(output / "02-depth")
    decoder = reference.get_decoder()
    decoder.layers[gone].forward = lambda hidden_states, **_: hidden_states
    for row in (text_row(), *media_rows(name)):
        torch.testing.assert_close(logits(result, row), logits(reference, row), rtol=1e-5, atol=1e-5)


def test_inspect_names_the_class_and_the_parts(name: str, source: Path, output: Path):
    for checkpoint in (source, output / "02-depth", made(output)[-3], made(output)[-1]):
        found = json.loads(invoke("inspect", checkpoint, "--json").output)
        assert found["auto_class"] == family_of(name).auto_class
        assert found["transformers"] == {"loads": True, "reason": None, "missing": [], "different_shape": []}
        parts = found["parameters_by_part"]
        assert set(family_of(name).kept) < set(parts)
        for tower in family_of(name).kept:
            assert parts[tower] > 0
        assert sum(parts.values()) == found["parameters"]
        if found["shape"]["quantization"] is None:
            assert found["parameters"] == load(checkpoint).num_parameters()


def test_healing_trains_the_text_tower(name: str, output: Path):
    [refit], [heal] = output.glob("*-refit"), output.glob("*-heal")
    record = json.loads((heal / "stage.json").read_text())
    assert record["decisions"]["kept"]["step"] > 0, record["decisions"]["checks"]
    before, after = tensors_of(refit), tensors_of(heal)
    prefixes = tuple(family_of(name).kept.values())
    same = {tensor for tensor in before if torch.equal(before[tensor], after[tensor])}
    assert {tensor for tensor in before if tensor.startswith(prefixes)} == same


@pytest.mark.parametrize("all_of_them", [True, False])
def test_linears_of_towers_are_rounded_where_asked_for(name: str, all_of_them: bool, output: Path, tmp_path: Path):
    family = family_of(name)
    towers = list(family.kept) if all_of_them else list(family.kept)[:1]
    head = {} if family.transformers_ties else {"head_bits": 8}
    [source] = output.glob("*-heal")
    recipe = write_recipe(tmp_path, source, [INT8 | {"towers": {tower: {"bits": 8} for tower in towers}} | head])
    planned = json.loads(invoke("plan", recipe, "--json").output)["checkpoints"]
    run(recipe)
    result = tmp_path / "out/01-int8"
    stored = tensors_of(result)
    assert planned[-1]["bytes"] == sum(tensor.nbytes for tensor in stored.values()) < planned[0]["bytes"]
    packed = {tensor.removesuffix(".weight_packed") for tensor in stored if tensor.endswith(".weight_packed")}
    rounded = {module for module in packed if family.place(module).tower in family.kept}
    assert {family.place(module).tower for module in rounded} == set(towers)
    before, after = load(source), load(result)
    schemes = [getattr(module, "quantization_scheme", None) for module in after.modules()]
    by_strategy = Counter(scheme.weights.strategy for scheme in schemes if scheme is not None)
    channels = len(rounded) + len(head)
    assert by_strategy == {"channel": channels, "group": len(packed) - channels}
    for row in media_rows(name):
        wanted, found = logits(before, row), logits(after, row)
        assert ((found - wanted).norm() / wanted.norm()) < 0.05
    inspected = json.loads(invoke("inspect", result, "--json").output)
    assert inspected["transformers"] == {"loads": True, "reason": None, "missing": [], "different_shape": []}
    assert inspected["parameters_by_part"] == planned[0]["parameters_by_part"]


def test_the_text_tower_writes_what_the_whole_model_does(name: str, source: Path, tmp_path: Path):
    openings = text_row()["input_ids"].view(4, 6)
    tower = load_model(Checkpoint(source), torch.device("cpu"), torch.float32)
    parts = [TextPart(openings[:3], 3, openings[3:])]
    [written] = continued(tower, Checkpoint(source).shape, parts, 0, tmp_path, quiet().progress)
    torch.manual_seed(0)
    expected = load(source).generate(
        input_ids=openings[:, :1], max_new_tokens=5, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(torch.cat([written.rows, written.deciding]), expected.int())


def test_towers_that_a_model_has_not_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    source = save("glm4v", tmp_path / "source", tokenizer)
    message = refusal("plan", write_recipe(tmp_path, source, [INT8 | {"towers": {"audio": {"bits": 8}}}]))
    assert_says(message, "stages.1.towers", "audio", "has the towers vision, adapter")
    awq = {"stage": "quantize", "bits": 4, "group_size": 32, "format": "awq", "towers": {"vision": {"bits": 8}}}
    assert_says(refusal("plan", write_recipe(tmp_path, source, [awq])), "stages.1.towers", "use compressed-tensors")
    message = refusal("plan", write_recipe(tmp_path, source, [INT8 | {"towers": {"vision": {"bits": 4}}}]))
    assert_says(message, "towers.vision.bits")
