"""The knapsack against brute force on small cases, against greedy on large ones, and its refusals."""

from __future__ import annotations

import time
from itertools import product
from math import inf, isclose, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.ir.errors import PassError
from fxpress.passes import knapsack
from fxpress.passes.knapsack import choose

Problem = tuple[list[list[float]], list[list[int]], int]


def cost_of(problem: Problem, taken: list[int]) -> float:
    return sum(c[i] for c, i in zip(problem[0], taken, strict=True))


def bytes_of(problem: Problem, taken: list[int]) -> int:
    return sum(b[i] for b, i in zip(problem[1], taken, strict=True))


def brute_force(problem: Problem) -> float:
    """Least cost over all combinations that fit; infinite when none does."""
    combinations = (list(c) for c in product(*(range(len(c)) for c in problem[0])))
    return min((cost_of(problem, c) for c in combinations if bytes_of(problem, c) <= problem[2]), default=inf)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to six items of up to four choices: few or many sizes, ties, zero, negative and forbidden costs, bytes up to beyond 64 bits."""
    sizes = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 1000), st.integers(10**12, 10**13), st.integers(0, 2**80)]))
    costs = draw(st.sampled_from([st.sampled_from([0.0, 1.0, 2.0, inf]), st.floats(-10, 10, width=32), st.floats(0, 1), st.just(0.0)]))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    prices = [draw(st.lists(costs, min_size=n, max_size=n)) for n in counts]
    weights = [draw(st.lists(sizes, min_size=n, max_size=n)) for n in counts]
    budget = draw(st.integers(sum(map(min, weights)), sum(map(max, weights)) + 1))
    return prices, weights, budget


def check(problem: Problem) -> None:
    best = brute_force(problem)
    if best == inf:
        with pytest.raises(PassError, match="knapsack"):
            choose(*problem)
        return
    taken = choose(*problem)
    assert bytes_of(problem, taken) <= problem[2]
    assert isclose(cost_of(problem, taken), best, rel_tol=1e-9, abs_tol=1e-9)
    assert choose(*problem) == taken


@settings(max_examples=400, deadline=None)
@given(problems())
def test_equals_brute_force(problem: Problem) -> None:
    check(problem)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_equals_brute_force_without_a_front_of_the_last_items_and_with_narrow_runs(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "END_STATES", 0)
        patch.setattr(knapsack, "WIDTH", 2)
        check(problem)


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_where_greedy_is_not_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 100, (6, 4)).tolist()
    problem = rng.random((6, 4)).tolist(), sizes, (sum(map(min, sizes)) * 2 + sum(map(max, sizes))) // 3
    check(problem)


def large(kind: str, seed: int, items: int = 210) -> Problem:
    """Bits 2, 3, 4, 8 at every item, error falling with bits: `few` sizes, or sizes and errors of any kind."""
    rng = np.random.default_rng(seed)
    shapes = rng.choice([331776, 110592, 884736], items)
    if kind == "few":
        sizes = [[int(s * b) // 8 for b in (2, 3, 4, 8)] for s in shapes]
        costs = [[float(w * s * 4.0**-b) for b in (2, 3, 4, 8)] for s, w in zip(shapes, np.exp(2 * rng.normal(size=items)), strict=True)]
    else:
        sizes = [sorted(map(int, rng.integers(1, 10**7, 4))) for _ in range(items)]
        costs = [sorted(map(float, rng.random(4)), reverse=True) for _ in range(items)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, least + (most - least) * int(rng.integers(5, 80)) // 100


def greedy_cost(problem: Problem) -> float:
    """Cost after taking, from the smallest choices on, the change of most saving per byte while one fits."""
    costs, sizes, budget = problem
    taken = [int(np.argmin(b)) for b in sizes]
    while True:
        room = budget - bytes_of(problem, taken)
        changes = [
            ((costs[i][t] - costs[i][c]) / (sizes[i][c] - sizes[i][t]), i, c)
            for i, t in enumerate(taken) for c in range(len(costs[i]))
            if 0 < sizes[i][c] - sizes[i][t] <= room and costs[i][c] < costs[i][t]
        ]  # fmt: skip
        if not changes:
            return cost_of(problem, taken)
        _, i, taken[i] = max(changes)


@pytest.mark.parametrize("kind", ["few", "any"])
@pytest.mark.parametrize("seed", range(4))
def test_large_cases_are_quick_and_never_worse_than_greedy(kind: str, seed: int) -> None:
    problem = large(kind, seed)
    began = time.process_time()
    taken = choose(*problem)
    assert time.process_time() - began < 5
    assert bytes_of(problem, taken) <= problem[2]
    assert cost_of(problem, taken) <= greedy_cost(problem) * (1 + 1e-12)


def test_equals_a_table_over_bytes() -> None:
    costs, sizes, budget = problem = large("few", 7, items=40)
    unit = 110592 // 8
    table = np.zeros(1)
    for c, b in zip(costs, sizes, strict=True):
        wider = np.full(len(table) + max(b) // unit, inf)
        for price, size in zip(c, b, strict=True):
            at = slice(size // unit, size // unit + len(table))
            wider[at] = np.minimum(wider[at], table + price)
        table = wider
    assert isclose(cost_of(problem, choose(*problem)), table[: budget // unit + 1].min(), rel_tol=1e-12)


def test_costs_proportional_to_bytes_end_within_a_billionth() -> None:
    rng = np.random.default_rng(3)
    sizes = [sorted(map(int, rng.integers(1, 10**5, 4))) for _ in range(60)]
    budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    taken = choose([[float(10**5 - b) for b in item] for item in sizes], sizes, budget)
    assert 0 <= budget - sum(b[i] for b, i in zip(sizes, taken, strict=True)) <= 1


def test_trivial_cases() -> None:
    assert choose([], [], 0) == []
    assert choose([[3.0]], [[5]], 5) == [0]
    assert choose([[1.0, 0.5, 0.5]], [[1, 9, 9]], 10) == [1]
    assert choose([[inf, 2.0], [0.0, 1.0]], [[0, 4], [3, 1]], 5) == [1, 1]


@pytest.mark.parametrize(
    ("costs", "sizes", "budget", "why"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], [[5, 9], [6, 9]], 10, "the least reachable is 11 bytes"),
        ([[inf, 0.0]], [[5, 9]], 8, "the least reachable is 9 bytes"),
        ([[inf, inf]], [[5, 9]], 10, "every choice of item 0 is forbidden"),
        ([[]], [[]], 10, "every choice of item 0 is forbidden"),
        ([[nan]], [[5]], 10, "item 0 has a cost of nan"),
        ([[1.0]], [[-1]], 10, "negative bytes"),
        ([[1.0]], [[1, 2]], 10, "item 0 has 1 costs and 2 sizes"),
        ([[1.0]], [], 10, "got 1 and 0"),
    ],
)
def test_refusals(costs: list[list[float]], sizes: list[list[int]], budget: int, why: str) -> None:
    with pytest.raises(PassError, match=why):
        choose(costs, sizes, budget)
