"""The race: the winner is the best of all members fitted alone, shared whitening, bonds within a tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.passes.kronecker_race import best_member, smallest_bond
from fxpress.passes.kronecker_sum import family, fit

T = (1, 2, 4, 8)


def _gram(columns: int) -> Tensor:
    x = torch.randn(400, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1, columns)
    return x.t() @ x / 400


def _matrix(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "pair":
        return torch.randn(32, 6, generator=generator) @ torch.randn(6, 32, generator=generator) + 0.1 * torch.randn(32, 32, generator=generator)
    if kind == "kronecker":
        parts = [torch.kron(torch.randn(8, 4, generator=generator), torch.randn(4, 8, generator=generator)) for _ in range(4)]
        return sum(parts, torch.zeros(32, 32)) + 0.3 * torch.randn(32, 32, generator=generator)
    return torch.randn(32, 32, generator=generator)


@pytest.mark.parametrize("kind", ["pair", "kronecker", "random"])
def test_the_winner_is_the_best_of_all(kind: str) -> None:
    matrix, gram, shared = _matrix(kind), _gram(32), dict[str, Any]()
    members = [(family(32, 32, t), 8) for t in T]
    winner = best_member(matrix, members, gram, 10, shared)
    alone = {t: fit(matrix, modes, chi, gram, 10)[1] for t, (modes, chi) in zip(T, members, strict=True)}
    assert winner.error == pytest.approx(min(alone.values()), rel=1e-3) and winner.modes.b == min(alone, key=alone.__getitem__)
    assert set(winner.errors) == set(T) and all(winner.errors[t] >= alone[t] * (1 - 1e-3) for t in T)
    assert {"pair": 1, "kronecker": 4}.get(kind, winner.modes.b) == winner.modes.b and len(shared) == 3


def test_without_a_gram_or_rounds_the_closed_forms_decide() -> None:
    matrix = _matrix("kronecker")
    members = [(family(32, 32, t), 8) for t in T]
    for gram, rounds in ((None, 10), (_gram(32), 0)):
        winner = best_member(matrix, members, gram, rounds, {})
        assert winner.errors == {m.b: fit(matrix, m, chi, gram, rounds)[1] for m, chi in members} and winner.error == min(winner.errors.values())


@pytest.mark.parametrize("t", [1, 2])
def test_the_smallest_bond_meets_the_tolerance_and_the_next_does_not(t: int) -> None:
    matrix, gram, modes = _matrix("random"), _gram(32), family(32, 32, t)
    for metric in (gram, None):
        chi = smallest_bond(matrix, modes, 24, metric, 6, 0.5, {})
        assert chi is not None and 1 < chi < 24
        assert fit(matrix, modes, chi, metric, 6)[1] <= 0.5 < fit(matrix, modes, chi - 1, metric, 6)[1]
        assert smallest_bond(matrix, modes, chi - 1, metric, 6, 0.5, {}) is None
