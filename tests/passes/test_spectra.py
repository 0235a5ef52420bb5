"""Spectra: the error is the discarded energy, the projection is the optimum, singular metrics are no special case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.passes.spectra import Spectrum, spectrum


def _problem(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, columns, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator), x.t() @ x / tokens, torch.rand(rows, generator=generator) + 0.1


def _error(found: Spectrum, matrix: Tensor, gram: Tensor, weights: Tensor, rank: int) -> float:
    down, up = found.factors(rank)
    kept = found.left[:, :rank]
    exact = (kept / found.scale.unsqueeze(1)) @ (kept.t() @ (found.scale.unsqueeze(1) * matrix.double()))
    assert torch.allclose((up @ down).double(), exact, atol=1e-5)
    scale = weights.double() / weights.double().mean()
    delta = matrix.double() - exact
    return float((scale * ((delta @ gram) * delta).sum(1)).sum())


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_error_is_the_discarded_energy(rows: int, columns: int, tokens: int, seed: int) -> None:
    matrix, gram, weights = _problem(rows, columns, tokens, seed)
    found = spectrum(matrix, gram, weights)
    for rank in range(1, min(rows, columns) + 1):
        assert _error(found, matrix, gram, weights, rank) == pytest.approx(float(found.energy[rank:].sum()), abs=1e-10 * float(found.energy.sum()))


def test_full_rank_is_exact_and_data_beats_the_plain_svd() -> None:
    matrix, gram, weights = _problem(24, 40, 400)
    down, up = spectrum(matrix, gram, weights).factors(24)
    assert torch.allclose(up @ down, matrix, atol=1e-5)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    plain = matrix.double() - u[:, :8] @ torch.diag(s[:8]) @ v[:8]
    weighted = spectrum(matrix, gram)
    assert float(weighted.energy[8:].sum()) < 0.5 * float(((plain @ gram) * plain).sum())
    assert torch.allclose(spectrum(matrix).energy.sqrt(), s, atol=1e-6)


def test_the_whitened_closed_form_is_the_same() -> None:
    """svd(W L) with C = L L^T, truncated, unwhitened: SVD-LLM's form."""
    matrix, gram, _ = _problem(24, 40, 400)
    root = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    whitened = torch.linalg.solve_triangular(root.t(), (u[:, :8] @ torch.diag(s[:8]) @ v[:8]).t(), upper=True)  # a check of shapes only
    assert whitened.shape == (40, 24)
    theirs = u[:, :8] @ torch.diag(s[:8]) @ v[:8] @ torch.linalg.inv(root)
    down, up = spectrum(matrix, gram).factors(8)
    assert torch.allclose((up @ down).double(), theirs, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_channels(tokens: int) -> None:
    matrix, gram, weights = _problem(24, 40, max(tokens, 1))
    found = spectrum(matrix, gram * (tokens > 0), weights * (tokens > 1))
    down, up = found.factors(6)
    assert bool(torch.isfinite(up @ down).all()) and found.error(6) == pytest.approx(0.0, abs=1e-5)


def test_the_rank_for_a_tolerance_is_the_smallest() -> None:
    found = spectrum(*_problem(24, 40, 400)[:2])
    for tolerance in (0.01, 0.1, 0.3, 0.9):
        rank = found.rank_for(tolerance)
        assert found.error(rank) <= tolerance and (rank == 1 or found.error(rank - 1) > tolerance)
