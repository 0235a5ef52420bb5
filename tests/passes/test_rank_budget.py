"""Budgets over ranks: optimal against brute force, the dense choice, the floor."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fxpress.ir.errors import PassError
from fxpress.passes.rank_budget import DENSE, Curve, allocate


def _curves(seed: int, count: int = 3, ranks: int = 6) -> dict[str, Curve]:
    generator = torch.Generator().manual_seed(seed)
    gains = [torch.rand(ranks, generator=generator).sort(descending=True).values * (10.0**-i) for i in range(count)]
    return {f"s{i}": Curve.of(g, unit=7, dense=7 * ranks + 5) for i, g in enumerate(gains)}


def _cost(curves: dict[str, Curve], ranks: dict[str, int]) -> tuple[int, float]:
    kept = sum(c.dense if ranks[n] == DENSE else c.unit * ranks[n] for n, c in curves.items())
    return kept, sum(0.0 if ranks[n] == DENSE else float(c.tails[ranks[n]]) for n, c in curves.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_the_greedy_is_optimal_at_one_cost_a_rank(seed: int, budget: float) -> None:
    curves = _curves(seed)
    ranks = allocate(curves, budget, 1, "test")
    total = sum(c.dense for c in curves.values())
    assert _cost(curves, ranks)[0] <= budget * total
    tried = (dict(zip(curves, r, strict=True)) for r in product(range(1, 7), repeat=3))
    best = min(_cost(curves, r)[1] for r in tried if _cost(curves, r)[0] <= budget * total)
    assert _cost(curves, ranks)[1] == pytest.approx(best, rel=1e-12) or _cost(curves, ranks)[1] < best  # a weight that stays may do better still


def test_gains_that_rise_are_taken_together_or_not_at_all() -> None:
    gains = {"late": torch.tensor([0.0, 0.0, 9.0, 0.0]), "even": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    curves = {name: Curve.of(g, unit=10, dense=100) for name, g in gains.items()}
    assert allocate(curves, 0.2, 1, "test") == {"late": 3, "even": 1}


def test_a_flat_spectrum_stays_dense() -> None:
    curves = {"flat": Curve.of(torch.ones(10), unit=20, dense=100), "steep": Curve.of(10.0 ** -torch.arange(10.0), unit=20, dense=100)}
    ranks = allocate(curves, 0.7, 1, "test")
    assert ranks["flat"] == DENSE and ranks["steep"] == 2
    assert allocate(curves, 1.0, 1, "test") == {"flat": DENSE, "steep": DENSE}


def test_multiples_and_the_floor() -> None:
    curves = _curves(0, ranks=12)
    assert all(r % 4 == 0 for r in allocate(curves, 0.6, 4, "test").values())
    with pytest.raises(PassError, match=r"budget=0.05 of 267 parameters at 3 sites is below the floor: rank 4 at every site already holds 84, a share"):
        allocate(curves, 0.05, 4, "test")
