"""CP decompositions: exact where the rank is known, bounded where the best approximation does not exist."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fxpress.passes.cp import Canonical, decompose, khatri_rao

DELTA, SECOND = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _error(found: Canonical, tensor: Tensor) -> float:
    return float((found.tensor() - tensor).norm() / tensor.norm())


def test_khatri_rao_is_the_columnwise_kronecker_product() -> None:
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    assert torch.allclose(khatri_rao([a, b]), torch.stack([torch.kron(a[:, r], b[:, r]) for r in range(4)], 1))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_tensor_of_known_rank_is_found(rank: int) -> None:
    factors = tuple(torch.randn(n, rank, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (12, 8, 3, 3))
    tensor = Canonical(factors=factors).tensor()
    assert _error(decompose(tensor, rank, _generator()), tensor) < 1e-3


def test_the_wave_step_has_rank_three_and_its_rank_two_terms_are_kept_from_growing() -> None:
    """`2 u_n - u_(n-1) + kappa Lap u_n` as a 2 x 3 x 3 kernel: its border rank is 2, so unbounded terms of rank 2 would come as near as one likes."""
    kappa = 0.25
    one, two = torch.eye(2, dtype=torch.float64)
    outer = [torch.einsum("a,i,j->aij", *v) for v in ((one, DELTA, 2 * DELTA + kappa * SECOND), (kappa * one, SECOND, DELTA), (two, DELTA, DELTA))]
    tensor = outer[0] + outer[1] - outer[2]
    errors = {rank: decompose(tensor, rank, _generator()) for rank in (1, 2, 3)}
    assert _error(errors[1], tensor) == pytest.approx(0.23, abs=0.02)
    assert _error(errors[3], tensor) < 1e-2
    assert all(found.terms <= 10 * float(tensor.norm()) for found in errors.values()) and _error(errors[2], tensor) < 0.2


def test_more_terms_never_hurt_much() -> None:
    tensor = torch.randn(10, 6, 3, 3, generator=_generator(), dtype=torch.float64)
    found = [_error(decompose(tensor, rank, _generator()), tensor) for rank in (2, 8, 24, 60)]
    assert all(b < a for a, b in pairwise(found)) and found[-1] < 0.15
