"""The optimum: against brute force, against a plain dynamic programme, never worse than scikit-learn, and every degenerate row."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.passes.lut import kmeans
from fxpress.passes.lut.kmeans import cluster_rows

from ...tiny import randn, seeded


def objective(matrix: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """`sum f (w - nearest entry)^2` of every row, `[N] f64`."""
    nearest = (matrix.double().unsqueeze(-1) - tables.double().unsqueeze(1)).square().amin(-1)
    return (nearest * weights.double()).sum(1)


def run_costs(x: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Cost of every run `[i, j)` of sorted points, by its definition."""
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            mean = np.average(x[i:j], weights=f[i:j])
            cost[i, j] = (f[i:j] * (x[i:j] - mean) ** 2).sum()
    return cost


def layered(x: np.ndarray, f: np.ndarray, runs: int) -> float:
    """The textbook dynamic programme, O(K n^2)."""
    cost = run_costs(x, f)
    best = cost[0]
    for _ in range(runs - 1):
        best = np.min(np.concatenate([(best[:, None] + cost), best[None]], 0), 0)
    return float(best[-1])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A row, its weights and a number of entries; values may repeat and weights may vanish."""
    count, entries = draw(st.integers(3, 40)), draw(st.integers(2, 12))
    generator = seeded(draw(st.integers(0, 2**31)))
    matrix = torch.randn(1, count, generator=generator) * 10 ** draw(st.floats(-4, 3))
    if draw(st.booleans()):
        matrix = matrix.mul(draw(st.integers(1, 4))).round()  # ties
    weights = torch.rand(1, count, generator=generator) ** draw(st.sampled_from([0, 1, 8]))
    return matrix, weights * (torch.rand(1, count, generator=generator) >= draw(st.sampled_from([0.0, 0.3]))), entries


@settings(max_examples=300)
@given(problems())
def test_is_the_optimum(problem: tuple[Tensor, Tensor, int]) -> None:
    matrix, weights, entries = problem
    tables = cluster_rows(matrix, weights, entries)
    known = weights if float(weights.sum()) > 0 else torch.ones_like(weights)
    order = np.argsort(matrix[0].double().numpy())
    x, f = matrix[0].double().numpy()[order], known[0].double().numpy()[order]
    want = layered(x[f > 0], f[f > 0], entries)
    got = float(objective(matrix, known, tables)[0])
    assert got <= want + 1e-6 * want + 1e-10 * float((known * matrix.square()).sum())


def test_is_the_best_of_all_partitions() -> None:
    matrix, weights = randn(1, 9), torch.rand(1, 9, generator=seeded(1)) + 0.01
    order = matrix[0].argsort()
    cost = run_costs(matrix[0, order].double().numpy(), weights[0, order].double().numpy())
    edges = ((0, *inner, 9) for inner in combinations(range(1, 9), 3))
    want = min(sum(cost[a, b] for a, b in pairwise(e)) for e in edges)
    assert float(objective(matrix, weights, cluster_rows(matrix, weights, 4))[0]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("entries", [2, 4, 7, 16, 64])
def test_is_never_worse_than_scikit_learn(entries: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    matrix, weights = randn(12, 384), randn(12, 384, seed=1).square() * torch.rand(1, 384, generator=seeded(2))
    ours = objective(matrix, weights, cluster_rows(matrix, weights, entries))
    for row, weight, mine in zip(matrix, weights, ours, strict=True):
        fitted = cluster.KMeans(n_clusters=entries, random_state=0, n_init="auto", max_iter=50).fit(row.numpy()[:, None], sample_weight=weight.numpy())
        theirs = objective(row[None], weight[None], torch.from_numpy(fitted.cluster_centers_).reshape(1, -1))
        assert float(mine) <= float(theirs[0]) * (1 + 1e-6)


def test_long_rows_come_close_on_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights = randn(3, 6000), randn(3, 6000, seed=1).square()
    best = objective(matrix, weights, cluster_rows(matrix, weights, 16))
    monkeypatch.setattr(kmeans, "EXACT", 700)
    found = objective(matrix, weights, cluster_rows(matrix, weights, 16))
    assert bool((found <= 1.01 * best).all()) and bool((found >= best * (1 - 1e-9)).all())


def test_degenerate_rows() -> None:
    rows = torch.stack([torch.zeros(32), torch.full((32,), 0.25), torch.arange(32) % 3 * 1.0, torch.arange(32.0)])
    tables = cluster_rows(rows, None, 8)
    assert torch.equal(tables[0], torch.zeros(8)) and torch.equal(tables[1], torch.full((8,), 0.25))
    assert set(tables[2].tolist()) == {0.0, 1.0, 2.0}
    assert objective(rows, torch.ones(4, 32), tables)[:3].max() == 0
    assert torch.equal(cluster_rows(rows[3:], torch.zeros(1, 32), 8), cluster_rows(rows[3:], None, 8)), "no weight at all counts all alike"


def test_evenly_spaced_points_where_many_partitions_tie() -> None:
    matrix = torch.arange(50.0).unsqueeze(0)
    tables = cluster_rows(matrix, None, 7)
    assert float(objective(matrix, torch.ones(1, 50), tables)[0]) == pytest.approx(layered(np.arange(50.0), np.ones(50), 7), rel=1e-6)


def test_weights_of_very_different_size_and_points_without_weight() -> None:
    matrix = torch.tensor([[0.0, 1.0, 2.0, 50.0, 51.0, 1e6]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert cluster_rows(matrix, weights, 2).flatten().tolist() == [1.0, 50.5]
    tiny = cluster_rows(matrix, weights * torch.tensor([1.0, 1e-20, 1.0, 1.0, 1.0, 0.0]), 2)
    assert bool(torch.isfinite(tiny).all()) and tiny[0, 1] == 50.5


def test_threads_and_order_of_points_change_nothing() -> None:
    matrix, weights = randn(300, 96), randn(300, 96, seed=1).square()
    tables = cluster_rows(matrix, weights, 8)
    shuffle = torch.randperm(96, generator=seeded(3))
    assert torch.equal(tables, cluster_rows(matrix, weights, 8, threads=2))
    torch.testing.assert_close(objective(matrix, weights, cluster_rows(matrix[:, shuffle], weights[:, shuffle], 8)), objective(matrix, weights, tables))
    assert bool((tables.diff(dim=1) >= 0).all())
