"""One-way filters for kernels: the facts of the wave equation, exact ranks, cancelling terms, and the variance of drawn filters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.oneway import filter_shapes, kernel
from fxpress.passes.oneway_fit import drawn, fitted

DELTA, LAPLACE = torch.tensor([0.0, 1, 0]), torch.tensor([1.0, -2, 1])
STIFFNESS, MASS = torch.tensor([-1.0, 2, -1]), torch.tensor([1.0, 4, 1]) / 6


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wave_step(kappa: float = 0.25) -> Tensor:
    """`u_{n+1} = 2 u_n - u_{n-1} + kappa Lap u_n` as a kernel `[1, 2, 3, 3]` over the two last fields."""
    now = 2 * torch.outer(DELTA, DELTA) + kappa * (torch.outer(DELTA, LAPLACE) + torch.outer(LAPLACE, DELTA))
    return torch.stack([now, -torch.outer(DELTA, DELTA)])[None].double()


def test_stencils_have_the_ranks_that_theory_says() -> None:
    """The 5-point Laplacian and the Q1 stiffness need two terms, the Q1 mass one."""
    laplacian = torch.outer(DELTA, LAPLACE) + torch.outer(LAPLACE, DELTA)
    stiffness = torch.outer(MASS, STIFFNESS) + torch.outer(STIFFNESS, MASS)
    for stencil, rank in ((laplacian, 2), (stiffness, 2), (torch.outer(MASS, MASS), 1)):
        weight = stencil.double()[None, None]
        assert int(torch.linalg.matrix_rank(stencil.double())) == rank
        assert fitted(weight, rank, seeded())[1] < 1e-12 and (rank == 1 or fitted(weight, rank - 1, seeded())[1] > 0.1)


def test_the_wave_step_needs_three_terms() -> None:
    """One term leaves .23, three are exact, and two come near only with terms that cancel: their size is kept, and reported."""
    _, one, _ = fitted(wave_step(), 1, seeded())
    _, two, cancelling = fitted(wave_step(), 2, seeded())
    filters, three, calm = fitted(wave_step(), 3, seeded())
    assert one == pytest.approx(0.23, abs=0.01)
    assert three < 1e-6 and calm < 1.1 and cancelling > 1.5 and 1e-4 < two < 0.02
    assert float((kernel(filters) - wave_step()).norm() / wave_step().norm()) < 1e-6


def test_filters_of_known_terms_are_found_for_every_map() -> None:
    shape = (6, 5, 3, 4)
    filters = {n: torch.randn(s, generator=seeded()) for n, s in filter_shapes(shape, 2).items()}
    weight = kernel(filters)
    again, error, _ = fitted(weight, 2, seeded())
    assert error < 1e-3 and float((kernel(again) - weight).norm() / weight.norm()) == pytest.approx(error, abs=1e-5)
    errors = [fitted(weight, terms, seeded())[1] for terms in (1, 2, 3)]
    assert errors[0] > errors[1] and errors[2] < 1e-2
    wide = fitted(torch.randn(4, 1, 3, 3, generator=seeded()), 5, seeded())
    assert wide[1] < 1e-6 and wide[0]["axis1"].shape == (4, 5, 1, 3), "more terms than there are stay zero"


@pytest.mark.parametrize(("shape", "terms"), [((256, 32, 3, 3), 1), ((256, 32, 3, 3), 4), ((512, 1, 5, 5), 2), ((256, 16, 5), 2)])
def test_drawn_products_have_the_variance_of_he(shape: tuple[int, ...], terms: int) -> None:
    made = kernel(drawn(shape, terms, seeded()))
    fan_in = made[0].numel()
    assert float(made.var()) * fan_in == pytest.approx(2.0, rel=0.25)
