"""The algebra of axes by itself."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.ir.atoms import Algebra, Atom, Axis, MisalignedError, factors, leaves, size_of, text
from fxpress.ir.axes import kept_positions, kept_size, labels

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 30])
STEPS = st.lists(st.tuples(st.sampled_from(["divide", "grouped", "split", "concat", "unify"]), *[st.integers(0, 1 << 16)] * 3), max_size=14)


def free_leaves(axis: Axis) -> list[Atom]:
    return list(dict.fromkeys(leaves(axis)))


def assert_consistent(axis: Axis, size: int) -> None:
    """Keeping all keeps every position, and keeping some keeps those whose label is kept."""
    assert size_of(axis) == size_of(factors(axis)) == size
    assert kept_positions(axis, {}).tolist() == list(range(size))
    for leaf in free_leaves(axis):
        kept = torch.arange(0, leaf.size, 2)
        positions, label = kept_positions(axis, {leaf: kept}), labels(axis, leaf)
        assert kept_size(axis, {leaf: kept}) == len(positions)
        assert len(label) == size
        if not twice(axis, leaf):
            assert positions.tolist() == [i for i, n in enumerate(label.tolist()) if n == -1 or n in kept.tolist()]


def twice(axis: Axis, leaf: Atom) -> bool:
    """Whether a position belongs to the leaf in two factors at once."""
    atoms = factors(axis)
    return sum(leaf in free_leaves((a,)) for a in atoms) > 1 or any(twice(p, leaf) for a in atoms for p in a.parts)


def step(algebra: Algebra, pool: list[Axis], kind: str, numbers: tuple[int, int, int]) -> None:
    i, j, n = numbers
    axis, other = pool[i % len(pool)], pool[j % len(pool)]
    size = size_of(axis)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    if kind == "divide":
        pool.append(algebra.divide(axis, divisors[n % len(divisors)]))
    elif kind == "grouped":
        pool.extend(algebra.grouped(axis, divisors[n % len(divisors)]))
    elif kind == "split" and size > 1:
        at = 1 + n % (size - 1)
        pool.extend(algebra.split(axis, [at, size - at]))
    elif kind == "concat" and size + size_of(other) <= 64:
        pool.append(algebra.concat([axis, other]))
    elif kind == "unify":
        same = [a for a in pool if size_of(a) == size]
        algebra.unify(axis, same[n % len(same)], "here")


@settings(max_examples=150)
@given(st.lists(SIZES, min_size=1, max_size=4), STEPS)
def test_any_sequence_of_steps_keeps_sizes_positions_and_labels(sizes: list[int], steps: list[tuple[str, int, int, int]]) -> None:
    algebra = Algebra()
    pool = [algebra.axis(s) for s in sizes]
    for kind, *numbers in steps:
        before = [size_of(a) for a in pool]
        with suppress(MisalignedError):
            step(algebra, pool, kind, (numbers[0], numbers[1], numbers[2]))
        assert [size_of(a) for a in pool[: len(before)]] == before
    algebra.settle()
    for axis in pool:
        assert_consistent(axis, size_of(axis))


@settings(max_examples=80)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_two_cuts_of_one_axis_share_their_refinement(first: list[int], second: list[int]) -> None:
    total = sum(first) + sum(second)
    algebra = Algebra()
    axis = algebra.axis(total)
    one = algebra.split(axis, [*first, sum(second)])
    two = algebra.split(axis, [sum(first), *second])
    assert [size_of(a) for a in one + two] == [*first, sum(second), sum(first), *second]
    assert free_leaves(algebra.concat(one)) == free_leaves(algebra.concat(two)) == free_leaves(axis)


def test_factors_of_two_views_meet() -> None:
    algebra = Algebra()
    axis, six = algebra.axis(24), algebra.axis(6)
    algebra.grouped(axis, 4)
    algebra.grouped(axis, 2)
    assert text(axis) == "2x2x6"
    algebra.unify(algebra.grouped(axis, 4)[1], six, "here")
    assert free_leaves(six)[0] is free_leaves(axis)[-1]


def test_factors_that_do_not_divide_are_pinned_not_guessed() -> None:
    algebra = Algebra()
    axis = algebra.axis(24)
    algebra.grouped(axis, 4)
    with pytest.raises(MisalignedError):
        algebra.grouped(axis, 3)
    a, b = algebra.axis(4) + algebra.axis(6), algebra.axis(6) + algebra.axis(4)
    algebra.unify(a, b, "there")
    algebra.settle()
    assert all(leaf.pins == ["axes that do not line up at there"] for leaf in leaves(a + b))


def test_interleaved_query_key_value() -> None:
    """`[heads, (d | d | d)]`, as GPT-NeoX stores it: a head takes its part of all three."""
    algebra = Algebra()
    axis = algebra.axis(24)
    heads, inner = algebra.grouped(axis, 2)
    q, k, v = algebra.split(inner, [4, 4, 4])
    algebra.unify(q, k, "scores")
    assert text(axis) == "2x(4|(4|4))"
    assert kept_positions(axis, {heads[0]: torch.tensor([1])}).tolist() == list(range(12, 24))
    kept = kept_positions(axis, {factors(q)[0]: torch.tensor([3, 0])}).tolist()
    assert kept == [3, 0, 7, 4, 8, 9, 10, 11, 15, 12, 19, 16, 20, 21, 22, 23]
    assert labels(axis, factors(v)[0]).tolist() == ([-1] * 8 + [0, 1, 2, 3]) * 2


def test_a_concatenation_seen_as_a_product_shares_the_inner_factor() -> None:
    algebra = Algebra()
    a, b = algebra.axis(4), algebra.axis(8)
    joined = algebra.concat([a, b])
    heads, inner = algebra.grouped(joined, 6)
    assert (text(joined), text(a), text(b)) == ("(2|4)x2", "2x2", "4x2")
    assert free_leaves(a)[-1] is free_leaves(b)[-1] is factors(inner)[0]
    assert text(heads) == "(2|4)"


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_an_axis_shifted_against_itself_ends_quickly(size: int) -> None:
    start = time.perf_counter()
    algebra = Algebra()
    axis = algebra.axis(size)
    _, high = algebra.split(axis, [1, size - 1])
    low, _ = algebra.split(axis, [size - 1, 1])
    algebra.unify(high, low, "add")
    algebra.settle()
    assert time.perf_counter() - start < 5
    assert sum(leaf.size for leaf in free_leaves(axis) if not leaf.pins) <= 1


def test_empty_axes_leave_no_trace() -> None:
    algebra = Algebra()
    empty, axis = algebra.axis(0), algebra.axis(4)
    assert algebra.concat([empty, axis]) is axis
    assert size_of(algebra.concat([empty, algebra.axis(0)])) == 0
    algebra.unify(empty + axis, axis + empty, "here")
    assert set(axis[0].pins) == {"axes that do not line up at here"}
    with pytest.raises(MisalignedError):
        algebra.divide(empty + axis, 4)


def test_pins_and_reductions_reach_the_leaves_of_either_side() -> None:
    algebra = Algebra()
    a, b = algebra.axis(12), algebra.axis(12)
    algebra.pin(a, "why")
    algebra.reduce(b, "mean")
    algebra.grouped(a, 3)
    algebra.unify(a, b, "here")
    algebra.settle()
    assert [(leaf.size, leaf.pins, leaf.reductions) for leaf in leaves(b)] == [(3, ["why"], ["mean"]), (4, ["why"], ["mean"])]
