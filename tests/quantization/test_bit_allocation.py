"""Which linears get 8 bits: against trying every choice, and what the budget is reckoned in."""

from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoglm_compress.architecture import Quantization, Scheme
from autoglm_compress.architecture.quantization import AWQ, COMPRESSED_TENSORS
from autoglm_compress.quantization.bit_allocation import (
    allocate,
    average_bits,
    checkpoint_bytes,
    groups_of,
    with_bits,
)
from support.quantizing import LAYERS, shape_of

torch.set_num_threads(1)
COSTS = st.one_of(st.floats(0, 1e-3), st.floats(0, 10), st.sampled_from([0.0, 1.0]))
SIZES = st.one_of(st.integers(1, 9), st.integers(1, 10**9), st.just(4096))


def left_at_few_bits(costs: list[float], chosen: tuple[bool, ...] | list[bool]) -> float:
    return sum(cost for cost, many in zip(costs, chosen, strict=True) if not many)


def taken(sizes: list[int], chosen: tuple[bool, ...] | list[bool]) -> int:
    return sum(size for size, many in zip(sizes, chosen, strict=True) if many)


def least_cost(costs: list[float], sizes: list[int], budget: int) -> float:
    choices = product([False, True], repeat=len(costs))
    return min(left_at_few_bits(costs, chosen) for chosen in choices if taken(sizes, chosen) <= budget)


@given(st.lists(st.tuples(COSTS, SIZES), min_size=1, max_size=10), st.floats(0, 1.1))
@settings(max_examples=150, deadline=None)
@example([(1.0, 10**9), (0.5, 10**9)], 0.5)
@example([(0.0, 5), (0.0, 5)], 0.5)
@example([(0.0, 10**6), (1.0, 1)], 0.0)
def test_no_choice_within_the_budget_is_better(groups: list[tuple[float, int]], share: float):
    costs, sizes = [cost for cost, _ in groups], [size for _, size in groups]
    budget = int(share * sum(sizes))
    chosen = allocate(costs, sizes, budget)
    assert len(chosen) == len(groups)
    assert all(isinstance(many, bool) for many in chosen)
    assert taken(sizes, chosen) <= budget
    # The solver stops where no choice can be better by more than a ten-thousandth of what is gained.
    assert left_at_few_bits(costs, chosen) <= least_cost(costs, sizes, budget) + 2e-4 * sum(costs) + 1e-12


@pytest.mark.parametrize("size", [8, 10**5, 10**8, 4096 * 4096 * 3 // 2])
def test_a_budget_that_is_one_short_is_not_overdrawn(size: int):
    assert allocate([1.0, 0.5], [size, size], size - 1) == [False, False]
    assert allocate([1.0, 0.5], [size, size], size) == [True, False]
    assert allocate([1.0, 0.5], [size, size], 2 * size - 1) == [True, False]
    assert allocate([1.0, 0.5], [size, size], 2 * size) == [True, True]


def test_nothing_and_everything():
    costs, sizes = [0.3, 0.1, 0.2], [5, 3, 4]
    assert allocate(costs, sizes, 0) == [False] * 3
    assert allocate(costs, sizes, 2) == [False] * 3
    assert allocate(costs, sizes, 12) == [True] * 3
    assert allocate(costs, sizes, 10**12) == [True] * 3


def test_a_small_one_first_is_not_always_best():
    # By cost per size the first is best, but it leaves no room for the two that together are.
    assert allocate([0.7, 0.6, 0.6], [6, 5, 5], 10) == [False, True, True]


def test_ties_are_settled_the_same_way_every_time():
    costs, sizes = [0.5] * 8, [7] * 8
    chosen = allocate(costs, sizes, 4 * 7)
    assert sum(chosen) == 4
    assert all(allocate(costs, sizes, 4 * 7) == chosen for _ in range(3))


def test_costs_of_nothing():
    chosen = allocate([0.0] * 4, [3] * 4, 6)
    assert taken([3] * 4, chosen) <= 6
    assert allocate([0.0, 1e-12, 0.0], [3, 3, 3], 3) == [False, True, False]


# Shapes


def quantization_of(shape, scheme: Scheme, form: str = COMPRESSED_TENSORS) -> Quantization:
    return Quantization(form, {name: scheme for name, _ in shape.linear_shapes()})


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_groups_are_the_linears_that_an_engine_fuses(family: str):
    shape = shape_of(family)
    groups = groups_of(shape)
    assert [group.layer for group in groups] == [layer for layer in range(LAYERS) for _ in range(4)]
    names = [name for group in groups for name in group.linears]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in shape.linear_shapes()}
    attention = ("q_proj", "k_proj", "v_proj")
    assert groups[0].linears == tuple(f"model.layers.0.self_attn.{name}" for name in attention)


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_average_bits_count_weights(family: str):
    shape = shape_of(family)
    quantization, groups = quantization_of(shape, Scheme(4, 32)), groups_of(shape)
    assert average_bits(shape, quantization.schemes) == 4
    one = with_bits(quantization, groups, [8] + [4] * (len(groups) - 1))
    shapes = dict(shape.linear_shapes())
    more = sum(shapes[name][0] * shapes[name][1] for name in groups[0].linears)
    every = sum(rows * columns for rows, columns in shapes.values())
    assert average_bits(shape, one.schemes) == pytest.approx(4 + 4 * more / every)
    with_head = one.schemes | {"lm_head": Scheme(8, -1)}
    assert average_bits(shape, with_head) == average_bits(shape, one.schemes)


def test_more_bits_take_what_they_take():
    shape = shape_of("llama")
    quantization, groups = quantization_of(shape, Scheme(4, 32)), groups_of(shape)
    shapes = dict(shape.linear_shapes())
    least = checkpoint_bytes(shape, quantization)
    for number, group in enumerate(groups):
        bits = [8 if number == other else 4 for other in range(len(groups))]
        weights = sum(shapes[name][0] * shapes[name][1] for name in group.linears)
        assert checkpoint_bytes(shape, with_bits(quantization, groups, bits)) == least + weights // 2


@pytest.mark.parametrize("scheme", [Scheme(4, 32, symmetric=False), Scheme(4, -1, symmetric=False)])
def test_zero_points_take_room_too(scheme: Scheme):
    rows, columns = 48, 64
    groups = rows * scheme.groups(columns)
    compressed = Quantization(COMPRESSED_TENSORS, {"x": scheme}).matrix_bytes("x", (rows, columns), 2)
    assert compressed == rows * columns // 2 + 2 * groups + groups // 2 + 16
    assert Quantization(AWQ, {"x": scheme}).matrix_bytes("x", (rows, columns), 4) == (
        rows * columns // 2 + 2 * groups + groups // 2
    )
