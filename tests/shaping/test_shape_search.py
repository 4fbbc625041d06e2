"""The search for a shape against every shape there is, and the sizes of a grid against those of its shapes."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_compress.architecture import ModelShape
from autoglm_compress.architecture.family_files import built_in
from autoglm_compress.shaping.costs import Axis, cheapest, largest_within, weighted
from autoglm_compress.shaping.grid import Grid, Stream, grid_of, smaller_sizes, step_of
from autoglm_compress.shaping.removed import Removed
from autoglm_compress.shaping.search import MOST_MEASURED, even_place, find_shape
from autoglm_compress.shaping.target import Target
from support.models import FAMILIES

ARCHITECTURES = {"glm": "GlmForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
assert ARCHITECTURES.keys() <= FAMILIES.keys()


def shape_of(family: str, tied: bool = False) -> ModelShape:
    return ModelShape(
        family=built_in()[ARCHITECTURES[family]],
        num_hidden_layers=8,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=512,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        switches=frozenset(),
    )


def places(grid: Grid) -> list[tuple[int, ...]]:
    return list(product(*map(range, grid.sizes.shape)))


# Grids


@given(st.integers(1, 20_000))
def test_default_steps_divide_a_size_into_parts_that_quantizing_takes(size: int):
    step = step_of(size)
    assert size % step == 0
    sizes = smaller_sizes(size, step)
    assert sizes[-1] == size
    assert all(kept % step == 0 and kept >= size / 4 for kept in sizes)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    "target",
    [
        {"parameters": "0.8x"},
        {"bytes": "1MB"},
        {"bytes": "1MB", "bits": 4, "group_size": 32},
        {"memory": "2MB", "context": 512, "bits": 8, "group_size": 64},
        {"memory": "2MB", "context": 100, "bits": 4, "group_size": -1},
    ],
    ids=str,
)
def test_the_sizes_of_a_grid_are_those_of_its_shapes(family: str, target: dict[str, object]):
    options = Target.model_validate(target)
    grid = grid_of(shape_of(family, tied=family == "qwen3"), options.multiple, options.size, lambda _: True)
    assert len(grid.streams) > 20
    for place in places(grid)[::37]:
        shape = grid.shape(place)
        assert grid.sizes[place] == options.size(shape)
        if options.multiple:
            inputs = [shape.hidden_size, shape.intermediate_size, shape.axis("query")]
            assert all(size % options.multiple == 0 for size in inputs)
        assert shape.num_attention_heads % shape.num_key_value_heads == 0


# Choices


@given(st.data())
def test_no_shape_within_the_limit_costs_less(data: st.DataObject):
    shape = tuple(data.draw(st.tuples(*[st.integers(1, 4)] * 3)))
    numbers = st.lists(st.integers(0, 5), min_size=prod(shape), max_size=prod(shape))
    costs, sizes = (np.array(data.draw(numbers), dtype=float).reshape(shape) for _ in range(2))
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=costs.size, max_size=costs.size))).reshape(shape)
    within = [place for place in product(*map(range, shape)) if allowed[place]]
    found = cheapest(costs, sizes, allowed)
    if not within:
        assert found is None
    else:
        assert found in within
        assert (costs[found], -sizes[found]) == min((costs[place], -sizes[place]) for place in within)


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_the_largest_within_a_limit_are_those_that_no_other_contains(seed: int, limit: int):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 6, (2, 3, 4)).cumsum(1).cumsum(2)
    found = largest_within(sizes, limit)
    for stream, neurons, layers in product(range(2), range(3), range(4)):
        larger = [sizes[stream, n, k] <= limit for n in range(neurons, 3) for k in range(layers, 4)]
        assert found[stream, neurons, layers] == (larger[0] and sum(larger) == 1)


@given(st.floats(0.05, 3), st.floats(0.6, 3.5), st.lists(st.floats(0.01, 1), min_size=2, max_size=2, unique=True))
@settings(deadline=None)
def test_a_power_goes_through_what_was_measured(scale: float, power: float, shares: list[float]):
    if abs(np.log(shares[0] / shares[1])) < 0.01:
        return
    axis = Axis("layers", np.array(shares)).through([(share, max(scale * share**power, 1e-5)) for share in shares])
    for share, cost in zip(shares, axis.costs, strict=True):
        if scale * min(shares) ** power > 1e-5:
            assert cost == pytest.approx(scale * share**power, rel=1e-6)


def test_measured_shapes_correct_what_a_size_weighs():
    """Layers cost twice what they cost alone once the FFN is cut as well."""
    layers = Axis("layers", np.linspace(1, 0, 5).reshape(1, 1, -1))
    neurons = Axis("neurons", np.linspace(1, 0, 5).reshape(1, -1, 1))
    measured = {(0, n, k): 2 * (1 - k / 4) + (1 - n / 4) for n in range(3) for k in range(3)}
    found = weighted([layers, neurons], measured)
    assert found[0].weight / found[1].weight == pytest.approx(2, rel=0.1)
    assert weighted([layers, neurons], {}) == [layers, neurons]


@st.composite
def models(draw: st.DrawFn) -> tuple[Grid, Removed, dict[str, float], int]:
    """A grid with what each size removes, what that really costs, and a limit that some of it keeps to."""
    target = Target(parameters="0.5x")
    shape = shape_of(draw(st.sampled_from(sorted(ARCHITECTURES))), draw(st.booleans()))
    grid = grid_of(shape, 64, target.size, lambda found: found.hidden_size % found.num_attention_heads == 0)
    curve = [draw(st.floats(0.5, 3)) for _ in range(4)]
    last = grid.streams[-1]
    removed = Removed(
        layers={
            method: draw(st.floats(0.5, 2)) * (1 - np.array(grid.layers) / 8) ** curve[0]
            for method in ("chain", "block_influence")
        },
        neurons=(1 - np.array(grid.neurons) / 512) ** curve[1],
        heads=np.array([(1 - stream.heads / last.heads * stream.key_value_heads / 4) for stream in grid.streams]),
        directions=np.array([(1 - stream.hidden / last.hidden) ** curve[3] for stream in grid.streams]),
    )
    costs = {name: draw(st.floats(0.1, 3)) for name in ("chain", "block_influence", "neurons", "heads", "directions")}
    sizes = np.unique(grid.sizes)
    limit = draw(st.integers(int(grid.smallest), int(sizes[-2])))
    return grid, removed, costs, limit


@given(models())
@settings(deadline=None, max_examples=25)
def test_the_search_finds_the_best_of_all_shapes_if_costs_add_up(model):
    grid, removed, weights, limit = model
    measured = []

    def cost(place: tuple[int, ...], method: str) -> float:
        stream, neuron, layer = place
        parts = {
            method: removed.layers[method][layer],
            "neurons": removed.neurons[neuron],
            "heads": removed.heads[stream],
            "directions": removed.directions[stream],
        }
        return sum(weights[name] * float(share) ** 1.2 for name, share in parts.items())

    def measure(place: tuple[int, ...], method: str) -> float:
        measured.append((place, method))
        return cost(place, method)

    found = find_shape(grid, removed, limit, measure)
    assert len(measured) <= MOST_MEASURED
    assert all(grid.sizes[trial.place] <= limit for trial in found.trials)
    assert found.best.divergence == min(trial.divergence for trial in found.trials)
    within = [place for place in places(grid) if grid.sizes[place] <= limit]
    best = min(cost(place, method) for place in within for method in removed.layers)
    assert found.best.divergence <= best * 1.02 + 1e-3
    assert found.best.divergence <= cost(even_place(grid, limit), found.depth_method)


def test_the_even_shape_cuts_all_sizes_alike():
    target = Target(parameters="0.5x")
    source = shape_of("llama")
    grid = grid_of(source, 32, target.size, lambda _: True)
    shape = grid.shape(even_place(grid, target.limit(source)))
    assert target.limit(source) * 0.9 < shape.parameters <= target.limit(source)
    ratios = [kept / source.cut_sizes[name] for name, kept in shape.cut_sizes.items() if "key_value" not in name]
    assert max(ratios) - min(ratios) <= 0.25  # heads are halved or whole, as every KV group stays
    assert shape.num_key_value_heads == 4
    assert Stream(8, 4, 256) == grid.streams[-1]
