"""The search on cases with a known answer, against the best mask of all, and its penalties."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from fxpress.passes.mask_search import LEAST, STAGE, proximal, search_mask
from fxpress.passes.masks import lowest_per_row
from fxpress.passes.refit import damped, refit


def layer(columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """A matrix and a damped Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), damped(x.T @ x / 300, 0.01)


def energy(delta: Tensor, hessian: Tensor) -> float:
    return float(((delta.double() @ hessian.double()) * delta.double()).sum())


def half(score: Tensor) -> Tensor:
    return lowest_per_row(score, score.shape[1] // 2)


def test_without_correlations_the_lowest_products_go() -> None:
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    hessian = torch.logspace(-2, 2, 8).diag()
    found, removed = search_mask(matrix, matrix, proximal(hessian, 20), half)
    assert torch.equal(removed, half(matrix.square() * hessian.diagonal()))
    assert torch.allclose(found, matrix.masked_fill(removed, 0.0), rtol=0.05)


def test_where_nothing_goes_nothing_moves() -> None:
    matrix, hessian = layer(16, 5)
    found, removed = search_mask(matrix, matrix, proximal(hessian, 7), lambda score: torch.zeros_like(score, dtype=torch.bool))
    assert not removed.any()
    assert torch.allclose(found, matrix, rtol=1e-3, atol=1e-3)


def test_comes_closer_to_the_best_masks_than_scores_do() -> None:
    matrix, hessian = layer(12, 20)
    first = half(matrix.square() * hessian.diagonal())
    start = refit(matrix, matrix.masked_fill(first, 0.0), first, hessian, 16)
    found, removed = search_mask(matrix, start, proximal(hessian, 20), half)
    ours = energy(refit(matrix, found, removed, hessian, 16) - matrix, hessian)
    best = sum(_best(row, hessian) for row in matrix)
    assert best * (1 - 1e-4) <= ours < 1.2 * best < 0.6 * energy(start - matrix, hessian)


def _best(row: Tensor, hessian: Tensor) -> float:
    """Least error of a row over all masks of half its columns."""
    h, w, least = hessian.double(), row.double(), float("inf")
    for kept in combinations(range(len(row)), len(row) // 2):
        keep = list(kept)
        delta = -w.clone()
        delta[keep] += torch.linalg.solve(h[keep][:, keep], (h @ w)[keep])
        least = min(least, float(delta @ h @ delta))
    return least


@pytest.mark.parametrize("rounds", [0, 1, STAGE, STAGE + 1, 40])
def test_penalties_double_up_to_one_and_rounds_add_up(rounds: int) -> None:
    _, hessian = layer(8, 1)
    stages = proximal(hessian, rounds).stages
    assert sum(span for _, _, span in stages) == rounds
    penalties = [rho for rho, _, _ in stages]
    assert all(b in (2 * a, LEAST) for a, b in pairwise(penalties))
    assert not penalties or penalties[-1] == 1.0
