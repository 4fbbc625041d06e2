"""The choice of layers: each method against every possible choice, or against whole models with layers skipped."""

import json
from collections.abc import Callable
from itertools import combinations
from math import acos, pi
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from autoglm_compress.calibration.reader import Reader
from autoglm_compress.calibration.tokens import token_rows
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting import layer_choice
from autoglm_compress.cutting.layer_choice import gaps, keep_chain, keep_without_block, remove_greedily, state_distances
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.forward.divergence import Divergence
from support.command_line import assert_says, plan, refusal
from support.places import QWEN
from support.quiet import CPU, quiet
from support.running import (
    Kill,
    compress,
    digests,
    just_written,
    load,
    logits,
    run,
    run_until_killed,
    tensors_of,
    write_recipe,
)

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
METHODS = ["block_influence", "angular", "chain", "greedy_loss", "random"]
MakeCheckpoint = Callable[..., Path]


def depth(method: str, keep: int | str = 2, **options: object) -> dict[str, object]:
    return {"stage": "depth", "num_hidden_layers": keep, "method": method} | options


def decisions(checkpoint: Path) -> dict[str, object]:
    return json.loads((checkpoint / "stage.json").read_text())["decisions"]


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The calibration rows of `running`, fewer than the statistics sample."""
    return token_rows(Reader(tokenizer), None, "fitted", 4, 32, 0)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Text of its own, for processes that are killed: to read the interpreter's takes each of them seconds."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"This is about the number {number}."}) for number in range(300)))
    return {"source": str(file), "samples": 4, "sequence_length": 32}


# Choices, from distances alone: whole numbers, so that ties happen and sums are exact.


@st.composite
def distances(draw: st.DrawFn) -> torch.Tensor:
    """A matrix between the states around up to seven layers; what is below the diagonal must not matter."""
    size = draw(st.integers(1, 7)) + 1
    entries = draw(st.lists(st.integers(-2, 9), min_size=size * size, max_size=size * size))
    return torch.tensor(entries, dtype=torch.float64).view(size, size).fill_diagonal_(0)


def total_cost(costs: torch.Tensor, kept: tuple[int, ...]) -> float:
    """What the gaps of a choice cost: before every kept layer, and at the end, one state stands in for another."""
    total, state = 0.0, 0
    for layer in kept:
        total += float(costs[state, layer])
        state = layer + 1
    return total + float(costs[state, len(costs) - 1])


@given(distances(), st.data())
@settings(deadline=None)
def test_no_other_chain_costs_less(costs: torch.Tensor, data: st.DataObject):
    layers = len(costs) - 1
    keep = data.draw(st.integers(0, layers))
    kept = keep_chain(costs, keep)
    assert kept in set(combinations(range(layers), keep))
    cheapest = min(total_cost(costs, choice) for choice in combinations(range(layers), keep))
    assert total_cost(costs, kept) == cheapest
    assert sum(float(costs[gap]) for gap in gaps(kept, layers)) == cheapest


@given(distances(), st.data())
@settings(deadline=None)
def test_no_other_block_is_closer(costs: torch.Tensor, data: st.DataObject):
    layers = len(costs) - 1
    keep = data.draw(st.integers(1, layers))
    kept, across = keep_without_block(costs, keep)
    assert across == [float(costs[first, first + layers - keep]) for first in range(keep + 1)]
    [(first, stop)] = gaps(kept, layers) or [(across.index(min(across)),) * 2]
    assert (len(kept), stop - first) == (keep, layers - keep)
    assert first == across.index(min(across))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_gap_can_be_anywhere(first: int):
    """Two layers of four do nothing: the first two, those in the middle, or the last two."""
    position = torch.zeros(5)
    position[1:] = torch.tensor([float(not first <= layer < first + 2) for layer in range(4)]).cumsum(0)
    costs = (position[:, None] - position).abs()
    kept = tuple(layer for layer in range(4) if not first <= layer < first + 2)
    assert keep_chain(costs, 2) == kept == keep_without_block(costs, 2)[0]
    assert gaps(kept, 4) == [(first, first + 2)]


def test_a_detour_that_comes_back_is_skipped_as_a_whole():
    """Layer 1 turns the state far away and layer 2 turns it back: either alone is dear to skip, both are free."""
    states = [torch.eye(3)[:1] * 1.0, torch.eye(3)[1:2], torch.eye(3)[2:], torch.eye(3)[1:2], torch.ones(1, 3)]
    costs = state_distances(states, lambda cosine: 1 - cosine)
    assert keep_chain(costs, 2) == (0, 3)


def test_distances_are_means_over_tokens():
    """More tokens than are compared at once, in bf16 as they are stored."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(150, 5, generator=generator).bfloat16() for _ in range(3)]
    for distance, obvious in (
        (lambda cosine: 1 - cosine, lambda cosine: 1 - cosine),
        (lambda cosine: cosine.arccos() / pi, lambda cosine: acos(cosine) / pi),
    ):
        found = state_distances(states, distance)
        assert torch.equal(found.diagonal(), torch.zeros(3).double())
        for i, j in combinations(range(3), 2):
            cosines = [_cosine(one.double(), other.double()) for one, other in zip(states[i], states[j], strict=True)]
            expected = sum(map(obvious, cosines)) / 150
            assert float(found[i, j]) == float(found[j, i]) == pytest.approx(expected, rel=1e-9)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


# Whole models with layers skipped


class _Skip(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def log_probabilities(checkpoint: Path, rows: torch.Tensor, skipped: tuple[int, ...] = ()) -> torch.Tensor:
    """Next-token log-probabilities in fp64 [tokens, vocab] of a whole model without some of its layers."""
    model = load(checkpoint)
    for layer in skipped:
        model.model.layers[layer] = _Skip()
    return logits(model, rows).double().log_softmax(-1).flatten(0, 1)


def kl_divergence(checkpoint: Path, rows: torch.Tensor, skipped: tuple[int, ...]) -> float:
    """Mean KL of a model without some of its layers from the whole one, written down as its definition."""
    whole, cut = log_probabilities(checkpoint, rows), log_probabilities(checkpoint, rows, skipped)
    return float((whole.exp() * (whole - cut)).sum(-1).mean())


@torch.no_grad()
def boundary_states(checkpoint: Path, rows: torch.Tensor) -> list[torch.Tensor]:
    """The states [tokens, hidden_size] before, between and after the layers of a whole model."""
    model = load(checkpoint)
    seen: list[torch.Tensor] = []
    for module in (*model.model.layers, model.model.norm):
        keep = lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].flatten(0, 1))  # noqa: E731
        module.register_forward_pre_hook(keep, with_kwargs=True)
    model(rows)
    return seen


def test_divergence_is_that_of_all_logits_at_once(
    make_checkpoint: MakeCheckpoint, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layer_choice, "VOCABULARY_SLICE", 100)  # not a divisor of the 512
    checkpoint = make_checkpoint("glm")
    [whole], cut = boundary_states(checkpoint, rows)[-1:], torch.randn(2, rows.numel(), 64)
    found = Divergence(Checkpoint(checkpoint), whole, CPU).of(torch.stack([whole, *cut]))
    assert abs(float(found[0])) < 1e-6
    model = load(checkpoint)
    with torch.no_grad():
        expected = [model.lm_head(model.model.norm(states)).double().log_softmax(-1) for states in (whole, *cut)]
    for number in (1, 2):
        terms = expected[0].exp() * (expected[0] - expected[number])
        assert float(found[number]) == pytest.approx(float(terms.sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize(("family", "tied"), [("glm4", False), ("qwen2", True)])
def test_greedy_loss_removes_what_changes_predictions_least(
    family: str, tied: bool, make_checkpoint: MakeCheckpoint, rows: torch.Tensor, tmp_path: Path
):
    """With sandwich norms, and with sliding windows in some layers and tied embeddings."""
    source = make_checkpoint(family, tie_word_embeddings=tied)
    result = compress(tmp_path, source, depth("greedy_loss"))
    skipped: tuple[int, ...] = ()
    for step in decisions(result)["scores"]["removed"]:
        left = [layer for layer in range(4) if layer not in skipped]
        changes = {layer: kl_divergence(source, rows, (*skipped, layer)) for layer in left}
        assert step["layer"] == min(changes, key=changes.get)
        assert step["kl_divergence"] == pytest.approx(changes[step["layer"]], rel=1e-4)
        skipped = (*skipped, step["layer"])
    assert len(skipped) == 2
    assert decisions(result)["kept_layers"] == [layer for layer in range(4) if layer not in skipped]
    cut = log_probabilities(result, rows)
    torch.testing.assert_close(cut, log_probabilities(source, rows, skipped), rtol=1e-4, atol=1e-4)


def greedy(checkpoint: Path, rows: torch.Tensor, file: Path) -> list[dict[str, float]]:
    return remove_greedily(Checkpoint(checkpoint), list(rows.split(3)), 2, quiet(), file)


def test_greedy_loss_looks_at_few_tokens(
    make_checkpoint: MakeCheckpoint, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At whole rows, or at the beginning of one that is too long."""
    checkpoint = make_checkpoint("glm")
    for limit, sample in ((70, rows[:2]), (16, rows[:1, :16])):
        monkeypatch.setattr(layer_choice, "GREEDY_TOKENS", limit)
        assert greedy(checkpoint, rows, tmp_path / f"{limit}.json") == greedy(checkpoint, sample, tmp_path / "sample")
        (tmp_path / "sample").unlink()


def test_predictions_that_are_not_finite(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    source = tmp_path / "model"
    copytree(make_checkpoint("glm"), source)
    tensors = tensors_of(source)
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path, source, [depth("greedy_loss")])
    message = refusal("run", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert_says(message, str(source), "without any one layer", "NaN or infinite")


def test_a_killed_greedy_loss_goes_on_with_the_next_round(
    make_checkpoint: MakeCheckpoint, calibration: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, stage = make_checkpoint("glm"), depth("greedy_loss")
    compress(tmp_path / "undisturbed", source, stage, calibration=calibration)
    recipe = write_recipe(tmp_path / "killed", source, [stage], calibration=calibration)
    assert run_until_killed(recipe, just_written("removed.json"))
    rounds, skip_each = [], layer_choice._skip_each
    monkeypatch.setattr(layer_choice, "_skip_each", lambda *given: rounds.append(given[1][:]) or skip_each(*given))
    assert "01-depth: going on" in run(recipe)
    assert [len(left) for left in rounds] == [3]
    assert digests(tmp_path / "killed" / "out") == digests(tmp_path / "undisturbed" / "out")


# From the source's statistics


def test_chain_and_angular_compare_the_states_between_layers(
    make_checkpoint: MakeCheckpoint, rows: torch.Tensor, tmp_path: Path
):
    source = make_checkpoint("qwen3")
    states = boundary_states(source, rows)
    costs = state_distances(states, lambda cosine: 1 - cosine)
    chain = decisions(compress(tmp_path / "chain", source, depth("chain")))
    assert chain["kept_layers"] == list(keep_chain(costs, 2))
    assert chain["scores"]["total_cost"] == pytest.approx(total_cost(costs, tuple(chain["kept_layers"])), rel=1e-3)
    gone = [layer for gap in chain["scores"]["gaps"] for layer in gap["layers"]]
    assert sorted(gone + chain["kept_layers"]) == [0, 1, 2, 3]

    angles = state_distances(states, lambda cosine: cosine.arccos() / pi)
    angular = decisions(compress(tmp_path / "angular", source, depth("angular")))
    assert angular["kept_layers"] == list(keep_without_block(angles, 2)[0])
    assert angular["scores"]["block_distances"] == pytest.approx([float(angles[i, i + 2]) for i in range(3)], rel=1e-3)


@pytest.mark.parametrize("method", ["angular", "chain"])
def test_layers_that_were_dropped_before_leave_no_boundary(
    method: str, make_checkpoint: MakeCheckpoint, rows: torch.Tensor, tmp_path: Path
):
    source = make_checkpoint("qwen3")
    before = {"stage": "depth", "layers": [0, 2, 3]}
    result = compress(tmp_path, source, before, depth(method, name="again"))
    states = [boundary_states(source, rows)[boundary] for boundary in (0, 2, 3, 4)]
    if method == "chain":
        kept = keep_chain(state_distances(states, lambda cosine: 1 - cosine), 2)
    else:
        kept, _ = keep_without_block(state_distances(states, lambda cosine: cosine.arccos() / pi), 2)
    assert decisions(result)["kept_layers"] == list(kept)
    assert Lineage.load(result / "lineage.json").layers == tuple((0, 2, 3)[layer] for layer in kept)


def test_a_killed_walk_measures_the_same_states(
    make_checkpoint: MakeCheckpoint, calibration: dict[str, object], tmp_path: Path
):
    source, stage = make_checkpoint("glm"), depth("chain")
    compress(tmp_path / "undisturbed", source, stage, calibration=calibration)
    recipe = write_recipe(tmp_path / "killed", source, [stage], calibration=calibration)
    assert run_until_killed(recipe, Kill("pathlib:Path.replace", "layer-00002"))
    run(recipe)
    assert digests(tmp_path / "killed" / "out") == digests(tmp_path / "undisturbed" / "out")
    measured = [_bytes_of_statistics(tmp_path / name / "out") for name in ("killed", "undisturbed")]
    assert len(measured[0]) == 5
    assert measured[0] == measured[1]


def _bytes_of_statistics(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob(".work/statistics-*/*.safetensors")}


# Options


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_drop(method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    chosen = decisions(compress(tmp_path, make_checkpoint("glm"), depth(method, "1x")))
    assert (chosen["method"], chosen["kept_layers"]) == (method, [0, 1, 2, 3])
    if method == "chain":
        assert chosen["scores"] == {"total_cost": 0, "gaps": []}
    if method == "greedy_loss":
        assert chosen["scores"] == {"removed": []}


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_stays(method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path):
    result = compress(tmp_path, make_checkpoint("llama"), depth(method, 1))
    assert len(decisions(result)["kept_layers"]) == 1
    load(result)


def test_listed_layers_have_no_scores(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    stage = {"stage": "depth", "layers": [0, 3], "method": "greedy_loss"}
    expected = {"method": "listed", "kept_layers": [0, 3], "scores": None}
    assert decisions(compress(tmp_path, make_checkpoint("glm"), stage)) == expected


def test_a_method_that_does_not_exist(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    message = refusal("plan", write_recipe(tmp_path, make_checkpoint("glm"), [depth("angulra")]))
    assert_says(message, "stages.1.method", "'angulra'", *METHODS)


def test_the_plan_counts_the_streams_of_greedy_loss(tmp_path: Path):
    """36 layers, 4,096 wide: 1.2 GB of streams. Measuring takes more than 2,048 states at 37 boundaries."""
    qwen = QWEN
    stages = [depth(method, "1x", name=method) for method in METHODS]
    calibration = {"source": "python-docs", "samples": 16, "sequence_length": 128}
    planned = plan(write_recipe(tmp_path, qwen, stages, calibration=calibration))["checkpoints"][1:]
    memory = {method: entry["peak_memory_bytes_estimate"] for method, entry in zip(METHODS, planned, strict=True)}
    assert memory["greedy_loss"] > memory["random"] + 1.2e9
    assert memory["chain"] == memory["angular"] == memory["block_influence"] > memory["random"]
