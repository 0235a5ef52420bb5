"""The weights that stay, against an exact least squares solution a row, and never worse than where they started."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.refit import damped, refit


def layer(columns: int = 24, rows: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, a damped Gram and a mask of half the weights."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    removed = torch.rand(rows, columns, generator=generator) < 0.5
    removed[0], removed[1] = True, False
    return torch.randn(rows, columns, generator=generator), damped(x.T @ x / 200, 0.01), removed


def energies(delta: Tensor, hessian: Tensor) -> Tensor:
    return ((delta.double() @ hessian.double()) * delta.double()).sum(1)


def test_equals_least_squares_over_the_weights_that_stay() -> None:
    matrix, hessian, removed = layer()
    got = refit(matrix, matrix.masked_fill(removed, 0.0), removed, hessian, 60).double()
    for row, target, gone in zip(got, matrix.double(), removed, strict=True):
        keep, h = ~gone, hessian.double()
        want = torch.linalg.solve(h[keep][:, keep], (h @ target)[keep])
        assert torch.allclose(row[keep], want, rtol=1e-3, atol=1e-4)
        assert not row[gone].any()


def test_every_step_lowers_the_error_of_every_row() -> None:
    matrix, hessian, removed = layer()
    start = matrix.masked_fill(removed, 0.0)
    errors = torch.stack([energies(refit(matrix, start, removed, hessian, n) - matrix, hessian) for n in range(8)])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5) + 1e-9).all()
    assert errors[7].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    matrix, hessian, removed = layer()
    start = matrix.masked_fill(removed, 0.0)
    assert torch.allclose(refit(matrix, start, removed, hessian * scale, 8), refit(matrix, start, removed, hessian, 8), rtol=1e-3, atol=1e-4)


def test_damping_leaves_the_gram_alone_and_gives_dead_columns_the_mean_curvature() -> None:
    gram = torch.diag(torch.tensor([3.0, 0.0, 1.0, 0.0]))
    assert damped(gram, 0.5).diagonal().tolist() == pytest.approx([3.75, 1.75, 1.75, 1.75])
    assert gram.diagonal().tolist() == [3.0, 0.0, 1.0, 0.0]
    assert torch.equal(damped(torch.zeros(2, 2), 0.1), 1.1 * torch.eye(2))
