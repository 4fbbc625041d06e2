"""The walk against whole models in transformers, its measurements against obvious ones, and the arithmetic of cuts."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoglm_compress.architecture.family import Family
from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.importance import choose_heads, random_scores, top
from autoglm_compress.cutting.lineage import Lineage
from autoglm_compress.cutting.surgery import cut_heads, cut_neurons, slice_axes
from autoglm_compress.forward.statistics import measure
from autoglm_compress.forward.walk import walk
from support.models import FAMILIES
from support.quiet import quiet
from support.running import load

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
EPS = 1e-5


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    """Batches of unequal size, longer than the sliding windows of the models that have one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 512, (rows, 24), generator=generator) for rows in (3, 1)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(request.param, rms_norm_eps=EPS)


def run_walk(checkpoint: Path, batches: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    """The last hidden states, copied out of the walk's buffers."""
    options = {"visitor": None, "runtime": quiet(), "title": "walk"} | options
    return [states.clone() for states in walk(Checkpoint(checkpoint), batches, **options)]


@torch.no_grad()
def whole_model(model: nn.Module, batches: list[torch.Tensor], *modules: str) -> dict[str, list[torch.Tensor]]:
    """The inputs of named modules, a tensor per batch, when the whole model runs."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for name in modules:
        append = seen[name].append
        hook = lambda _, args, kwargs, append=append: append((args or tuple(kwargs.values()))[0])  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    for batch in batches:
        model(batch)
    return seen


def test_the_walk_ends_where_the_whole_model_does(folder: Path, batches: list[torch.Tensor]):
    expected = whole_model(load(folder), batches, "model.norm")["model.norm"]
    torch.testing.assert_close(run_walk(folder, batches), expected, rtol=1e-5, atol=1e-5)


def test_a_walk_in_mapped_files_is_the_one_in_memory(folder: Path, batches: list[torch.Tensor], tmp_path: Path):
    mapped, in_memory = run_walk(folder, batches, folder=tmp_path), run_walk(folder, batches)
    assert all(map(torch.equal, mapped, in_memory))


class Witness:
    """Notes the layers it sees; can stop a walk at the end of one."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.entered: list[int] = []
        self.stop_after = stop_after

    def enter(self, layer: int, module: nn.Module) -> None:
        self.entered.append(layer)

    def leave(self, layer: int, module: nn.Module) -> None:
        if layer == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stopped_at", range(4))
def test_a_stopped_walk_goes_on_at_the_layer_it_had_reached(
    make_checkpoint: Callable[..., Path], batches: list[torch.Tensor], tmp_path: Path, stopped_at: int
):
    folder = make_checkpoint("glm4")
    with pytest.raises(KeyboardInterrupt):
        run_walk(folder, batches, folder=tmp_path, visitor=Witness(stop_after=stopped_at))
    again = Witness()
    states = run_walk(folder, batches, folder=tmp_path, visitor=again)
    assert again.entered == list(range(stopped_at, 4))
    assert all(map(torch.equal, states, run_walk(folder, batches)))


def test_a_walk_stopped_in_another_dtype_starts_again(
    make_checkpoint: Callable[..., Path], batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when it ran on a GPU before and now runs on a CPU."""
    folder = make_checkpoint("glm4")
    with monkeypatch.context() as patches:
        patches.setattr("autoglm_compress.forward.walk.compute_dtype", lambda *_: torch.bfloat16)
        with pytest.raises(KeyboardInterrupt):
            run_walk(folder, batches, folder=tmp_path, visitor=Witness(stop_after=2))
    again = Witness()
    states = run_walk(folder, batches, folder=tmp_path, visitor=again)
    assert again.entered == [0, 1, 2, 3]
    assert all(map(torch.equal, states, run_walk(folder, batches)))


# Statistics


def normalised(states: list[torch.Tensor]) -> torch.Tensor:
    """All tokens [tokens, hidden_size] divided by their root mean square, in fp64."""
    x = torch.cat([batch.flatten(0, 1) for batch in states]).double()
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt()


def mean_outer(rows: torch.Tensor) -> torch.Tensor:
    """The mean of the outer products of rows [tokens, features] with themselves."""
    return torch.stack([torch.outer(row, row) for row in rows]).mean(0)


def test_what_is_measured_is_what_the_whole_model_shows(folder: Path, batches: list[torch.Tensor], tmp_path: Path):
    checkpoint = Checkpoint(folder)
    statistics = measure(checkpoint, batches, tmp_path, quiet())
    assert not (tmp_path / "walk").exists()
    family = checkpoint.family
    layers = [f"model.layers.{layer}" for layer in range(4)]
    parts = (family.attention_output, family.mlp_output, *family.hidden_norms)
    names = [*layers, *(f"{layer}.{part}" for layer in layers for part in parts), "model.norm"]
    inputs = whole_model(load(folder), batches, *names)
    streams = [*layers, "model.norm"]
    for number, layer in enumerate(layers):
        expected = _obvious(inputs, layer, streams[number + 1], family)
        measured = dict(statistics.layer(number))
        boundary = torch.cat([batch.flatten(0, 1) for batch in inputs[layer]]).bfloat16()  # few tokens: all of them
        torch.testing.assert_close(measured.pop("boundary"), boundary, rtol=2**-7, atol=1e-5)
        assert measured.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(measured[name], value.float(), rtol=1e-4, atol=1e-5, msg=f"{layer} {name}")
    final = normalised(inputs["model.norm"])
    torch.testing.assert_close(statistics.final()["mean_abs"], final.abs().mean(0).float())
    torch.testing.assert_close(statistics.final()["mean_square"], final.square().mean(0).float())
    torch.testing.assert_close(statistics.final()["residual_gram"], mean_outer(final).float(), rtol=1e-4, atol=1e-5)
    boundary = torch.cat([batch.flatten(0, 1) for batch in inputs["model.norm"]]).bfloat16()
    torch.testing.assert_close(statistics.final()["boundary"], boundary, rtol=2**-7, atol=1e-5)


def _obvious(
    inputs: dict[str, list[torch.Tensor]], layer: str, following: str, family: Family
) -> dict[str, torch.Tensor]:
    """The statistics of one layer, written down as their definitions."""

    def tokens(name: str) -> torch.Tensor:
        return torch.cat([batch.flatten(0, 1) for batch in inputs[name]]).double()

    heads = tokens(f"{layer}.{family.attention_output}")
    expected = {
        "block_influence": 1 - torch.stack(list(map(_cosine, tokens(layer), tokens(following)))).mean(),
        "head_norm": torch.stack([heads[:, 16 * h : 16 * (h + 1)].square().sum(1).sqrt().sum() for h in range(8)]),
        "head_gram": torch.stack([mean_outer(heads[:, 16 * h : 16 * (h + 1)]) for h in range(8)]),
        "neuron_norm": tokens(f"{layer}.{family.mlp_output}").square().sum(0).sqrt(),
        "residual_gram": sum(mean_outer(normalised(inputs[f"{layer}.{norm}"])) for norm in family.norm_readers) / 2,
    }
    for norm in family.hidden_norms:
        x = normalised(inputs[f"{layer}.{norm}"])
        expected |= {f"{norm}.mean_abs": x.abs().mean(0), f"{norm}.mean_square": x.square().mean(0)}
    return expected


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one @ other / (one.norm() * other.norm())


def test_the_states_of_a_sample_are_spread_over_all_tokens(
    make_checkpoint: Callable[..., Path], batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = Checkpoint(make_checkpoint("glm"))
    every = measure(checkpoint, batches, tmp_path / "every", quiet())
    monkeypatch.setattr("autoglm_compress.forward.statistics.SAMPLE_TOKENS", 10)
    some = measure(checkpoint, batches, tmp_path / "some", quiet())
    positions = [4, 14, 24, 33, 43, 52, 62, 72, 81, 91]  # of 96, the last 24 of which are in the second batch
    assert torch.equal(some.layer(2)["boundary"], every.layer(2)["boundary"][positions])
    assert torch.equal(some.final()["boundary"], every.final()["boundary"][positions])


def test_complete_statistics_are_not_measured_again(
    make_checkpoint: Callable[..., Path], batches: list[torch.Tensor], tmp_path: Path
):
    checkpoint = Checkpoint(make_checkpoint("glm"))
    measure(checkpoint, batches, tmp_path, quiet())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    measure(checkpoint, [], tmp_path, quiet())
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


# Choosing: whole numbers as scores, so that ties happen and sums are exact.

SCORES = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(SCORES, st.data())
def test_top_keeps_the_best_and_of_equals_the_first(scores: list[int], data: st.DataObject):
    count = data.draw(st.integers(1, len(scores)))
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]
    assert top(torch.tensor(scores, dtype=torch.float32), count) == tuple(sorted(best))


@given(SCORES, st.data())
def test_top_in_two_steps_is_top_at_once(scores: list[int], data: st.DataObject):
    wide = data.draw(st.integers(1, len(scores)))
    narrow = data.draw(st.integers(1, wide))
    values = torch.tensor(scores, dtype=torch.float32)
    first = top(values, wide)
    second = top(values[list(first)], narrow)
    assert tuple(first[index] for index in second) == top(values, narrow)


@given(st.integers(1, 3), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_no_other_allowed_choice_of_heads_scores_higher(groups: int, size: int, data: st.DataObject):
    scores = data.draw(st.lists(st.integers(0, 6), min_size=groups * size, max_size=groups * size))
    keep_groups = data.draw(st.integers(1, groups))
    per_group = data.draw(st.integers(1, size))
    keep_heads = keep_groups * per_group
    heads, kept_groups = choose_heads(torch.tensor(scores, dtype=torch.float32), groups, keep_heads, keep_groups)

    assert heads == tuple(sorted(set(heads)))
    assert len(kept_groups) == keep_groups
    assert [head // size for head in heads] == [group for group in kept_groups for _ in range(per_group)]
    allowed = [
        choice
        for choice in combinations(range(groups * size), keep_heads)
        if all(sum(head // size == group for head in choice) in (0, per_group) for group in range(groups))
    ]
    assert heads in allowed
    assert sum(scores[head] for head in heads) == max(sum(scores[head] for head in choice) for choice in allowed)


def test_random_scores_depend_on_seed_and_layer():
    assert torch.equal(random_scores(8, 1, 2), random_scores(8, 1, 2))
    assert not torch.equal(random_scores(8, 1, 2), random_scores(8, 1, 3))
    assert not torch.equal(random_scores(8, 1, 2), random_scores(8, 2, 2))


# Cutting


@given(st.data())
@settings(deadline=None)
def test_slices_are_what_indexing_gives(data: st.DataObject):
    """A matrix of rows by head and columns by residual channel, a fused gate and up, and a vector; uncut axes stay."""
    indices = lambda size: st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))  # noqa: E731
    heads, groups, neurons, channels = (data.draw(indices(size)) for size in (6, 2, 5, 7))
    cut = cut_heads(heads, groups, 3) | cut_neurons(neurons, 5) | {"hidden": torch.tensor(channels)}

    query = torch.randn(18, 7)
    expected = query.view(6, 3, 7)[list(heads)][:, :, list(channels)].flatten(0, 1)
    assert torch.equal(slice_axes(query, ("query", "hidden"), cut), expected)
    output = torch.randn(7, 18)
    expected = output.view(7, 6, 3)[list(channels)][:, list(heads)].flatten(1)
    assert torch.equal(slice_axes(output, ("hidden", "query"), cut), expected)
    value = torch.randn(6)
    assert torch.equal(slice_axes(value, ("key_value",), cut), value.view(2, 3)[list(groups)].flatten())
    gate, up = torch.randn(2, 5, 7)
    expected = torch.cat([gate[list(neurons)], up[list(neurons)]])[:, list(channels)]
    assert torch.equal(slice_axes(torch.cat([gate, up]), ("gate_up", "hidden"), cut), expected)
    embedding = torch.randn(9, 7)
    assert torch.equal(slice_axes(embedding, ("vocab", "hidden"), cut), embedding[:, list(channels)])
    assert slice_axes(embedding, ("vocab", "head_dim"), cut) is embedding


def test_a_lineage_survives_the_disk_and_composes(make_checkpoint: Callable[..., Path], tmp_path: Path):
    whole = Lineage.of_source(Checkpoint(make_checkpoint("glm")).shape)
    once = whole.keep_layers((0, 2, 3)).keep_channels((1, 3, 5)).keep_neurons(((0, 7), (1, 8), (2, 9)))
    twice = (
        once.keep_layers((1, 2)).keep_channels((0, 2)).keep_neurons(((1,), (0,))).keep_heads(((4,),) * 2, ((1,),) * 2)
    )
    assert (twice.layers, twice.channels, twice.neurons) == ((2, 3), (1, 5), ((8,), (2,)))
    assert (twice.heads, twice.key_value_heads) == (((4,), (4,)), ((1,), (1,)))
    twice.save(tmp_path / "lineage.json")
    assert Lineage.load(tmp_path / "lineage.json") == twice
