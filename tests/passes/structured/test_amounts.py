"""Amounts: legal counts, uniform and ranked schedules, bisection, ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpress.passes.structured.amounts import Limits, choose_indices, first_indices, ranked, uniform

from .nets import groups_of, tiny_with_data

LIMITS = st.builds(Limits, multiple_of=st.sampled_from([1, 2, 8, 16]), min_keep=st.sampled_from([0.0, 0.1, 0.5, 1.0]))


@pytest.fixture(scope="module")
def llama() -> list:  # type: ignore[type-arg]
    return groups_of(tiny_with_data("llama")[0])


@given(limits=LIMITS, level=st.integers(0, 1000))
def test_legal_counts_are_kept(limits: Limits, level: int) -> None:
    groups = groups_of(tiny_with_data("llama")[0])
    for schedule in (uniform(groups, limits), ranked(groups, limits, {g: torch.rand(g.size) for g in groups}, lambda g: g.parameters)):
        for group, count in schedule.at(min(level, schedule.levels)).items():
            assert 1 <= count <= group.size
            assert count == group.size or count % limits.step(group) == 0
            assert count >= min(group.size, limits.min_keep * group.size)


def test_uniform_takes_the_nearest_legal_count(llama: list) -> None:  # type: ignore[type-arg]
    counts = uniform(llama, Limits(multiple_of=8)).at(300)
    assert [counts[g] for g in llama] == [1, 1, 64, 1, 1, 64]  # 0.7 x 88 = 61.6, 0.7 x 2 = 1.4
    assert list(uniform(llama, Limits()).at(0).values()) == [g.size for g in llama]


def test_ranked_removes_the_cheapest_first(llama: list) -> None:  # type: ignore[type-arg]
    scores = {g: torch.ones(g.size) for g in llama}
    scores[llama[2]] = torch.full((88,), 1e-6)
    schedule = ranked(llama, Limits(multiple_of=8, min_keep=0.5), scores, lambda g: 1)
    assert [schedule.at(i)[llama[2]] for i in range(7)] == [88, 80, 72, 64, 56, 48, 48]
    assert all(schedule.at(5)[g] == g.size for g in llama if g is not llama[2])


def test_bisection_finds_the_first_level_that_fits(llama: list) -> None:  # type: ignore[type-arg]
    schedule = ranked(llama, Limits(), {g: torch.rand(g.size, generator=torch.Generator().manual_seed(1)) for g in llama}, lambda g: g.parameters)
    for target in (0, 1, 37, schedule.levels):
        total = sum(schedule.at(target).values())
        assert schedule.first(lambda counts, total=total: sum(counts.values()) <= total) == target  # type: ignore[misc]
    assert schedule.first(lambda counts: False) is None


def test_the_last_step_overshoots_no_more_than_it_must(llama: list) -> None:  # type: ignore[type-arg]
    scores = {g: torch.ones(g.size) for g in llama}
    schedule = ranked(llama, Limits(), scores, lambda g: 1)
    exact = schedule.closest(lambda counts: sum(counts.values()) <= 179)
    assert exact is not None
    assert sum(exact.values()) == 179
    heavy = {g: torch.full((g.size,), 1e-9 if g is llama[2] else 1.0) for g in llama}
    schedule = ranked(llama, Limits(multiple_of=8, min_keep=0.8), heavy, lambda g: 1)
    counts = schedule.closest(lambda counts: sum(g.parameters * k for g, k in counts.items()) <= sum(g.parameters * g.size for g in llama) - 100)
    assert counts is not None
    assert counts[llama[2]] == 80 and sum(counts.values()) == sum(g.size for g in llama) - 8
    assert schedule.closest(lambda counts: True) == schedule.at(0)
    assert schedule.closest(lambda counts: False) is None


def test_ties_keep_the_lower_index() -> None:
    assert choose_indices(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_stand_ins_name_only_what_shrinks(llama: list) -> None:  # type: ignore[type-arg]
    counts = {g: g.size for g in llama} | {llama[0]: 1}
    assert {g.name: i.tolist() for g, i in first_indices(counts).items()} == {llama[0].name: [0]}
