"""Tensor trains: exact at full bonds, the error is the discarded energy, the paper's worked example."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.ir.trains import contract, decompose, full_bonds, train_parameters
from fxpress.passes.modes import balanced_modes

SIX = (6, 6, 6)


def test_the_worked_example_of_compactifai() -> None:
    """216 x 216 as three sites: `36 chi + 36 chi^2 + 36 chi` numbers; 35 is the last bond that saves any, 36 is exact."""
    assert [train_parameters(SIX, SIX, chi) for chi in (1, 10)] == [108, 36 * 10 + 36 * 100 + 36 * 10]
    assert train_parameters(SIX, SIX, 35) < 216**2 < train_parameters(SIX, SIX, 36) == 49_248
    matrix = torch.randn(216, 216, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert full_bonds(SIX, SIX) == (36, 36)
    assert torch.allclose(decompose(matrix, SIX, SIX, chi=36).matrix(), matrix, atol=1e-10)


@pytest.mark.parametrize("chi", [1, 7, 20, 35])
def test_the_error_is_the_discarded_energy(chi: int) -> None:
    matrix = torch.randn(216, 216, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    train = decompose(matrix, SIX, SIX, chi=chi)
    assert train.parameters == train_parameters(SIX, SIX, chi)
    assert float((train.matrix() - matrix).square().sum()) == pytest.approx(sum(train.discarded), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), sites=st.integers(1, 4), seed=st.integers(0, 9))
def test_any_shape_is_exact_without_truncation(rows: int, columns: int, sites: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    train = decompose(matrix, balanced_modes(rows, sites), balanced_modes(columns, sites))
    assert torch.allclose(train.matrix(), matrix, atol=1e-10) and contract(train.cores).shape[0] >= rows


@pytest.mark.parametrize("tolerance", [0.01, 0.2, 0.6])
def test_a_tolerance_bounds_the_whole_error(tolerance: float) -> None:
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * torch.logspace(0, -2, 48, dtype=torch.float64)
    train = decompose(matrix, (4, 4, 4), (3, 4, 4), tolerance=tolerance)
    assert float((train.matrix() - matrix).norm() / matrix.norm()) <= tolerance
    assert train.parameters < train_parameters((4, 4, 4), (3, 4, 4), 10**6) or tolerance < 0.1


def test_a_kronecker_product_has_bond_one() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randn(3, 5, generator=generator, dtype=torch.float64)
    train = decompose(torch.kron(a, b), (8, 3), (6, 5))
    assert train.parameters == 48 + 15 and torch.allclose(train.matrix(), torch.kron(a, b))
