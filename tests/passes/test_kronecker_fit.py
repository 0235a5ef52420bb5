"""Alternating least squares: whitening, the error that is kept along, optimality of both solves, descent, singular Grams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.kronecker_fit import Fit, rearranged, whitened_energy, whitening
from fxpress.passes.kronecker_sum import Cores, Modes, family, fit


def _gram(columns: int, tokens: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return x.t() @ x / tokens


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def _error(running: Fit, matrix: Tensor, gram: Tensor) -> float:
    """In float64, for inputs as they are."""
    first, second = running.cores()
    delta = Cores(first=first, second=second, rows=len(matrix), columns=matrix.shape[1]).matrix().double() - matrix.double()
    wide = gram.double()
    return float((((delta @ wide) * delta).sum() / ((matrix.double() @ wide) * matrix).sum()) ** 0.5)


def test_a_kronecker_gram_is_whitened_to_the_identity() -> None:
    outer, inner = _gram(4) + 0.1 * torch.eye(4), _gram(6) + 0.1 * torch.eye(6)
    white = whitening(torch.kron(outer, inner), Modes(a=1, b=4, c=1, d=6))
    assert torch.allclose(white.gram, torch.eye(24), atol=2e-3)
    rows = torch.randn(3, 24)
    assert torch.allclose(white.apply(rows), rows @ torch.kron(white.outer, white.inner), atol=1e-4)


@pytest.mark.parametrize("modes", [family(24, 32, 2), family(23, 29, 4), Modes(a=3, b=8, c=8, d=4)])
def test_the_error_kept_along_is_the_true_one(modes: Modes) -> None:
    columns, rows = min(modes.b * modes.d, 32), min(modes.a * modes.c, 24)
    matrix, gram = _weight(rows, columns), _gram(columns)
    running = Fit(matrix, modes, whitening(gram, modes), 5)
    errors = [running.error]
    for _ in range(4):
        assert running.error == pytest.approx(_error(running, matrix, gram), rel=2e-3)
        running.refine(1)
        errors.append(running.error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


def test_the_first_core_is_the_least_squares_answer() -> None:
    modes, matrix, gram = family(16, 16, 2), _weight(16, 16), _gram(16)
    white = whitening(gram, modes)
    running = Fit(matrix, modes, white, 3)
    running._solve_first()
    columns = torch.einsum("rcd,bB->crbBd", running.second.view(3, 2, 8), torch.eye(2))  # [c, r, b, b', d]: what each number of a row of A does
    root = torch.linalg.cholesky(white.gram.double())
    design = torch.cat([columns[c].transpose(0, 1).reshape(6, 16).double() @ root for c in range(2)], 1)  # [(b r), (c K)]
    rows = white.apply(matrix).double().view(8, 2, 16) @ root
    best = torch.linalg.lstsq(design.t(), rows.reshape(8, -1).t()).solution.t()
    assert torch.allclose(running.first.view(8, 6).double(), best, atol=1e-3)


def test_conjugate_gradients_reach_the_second_core_s_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.passes.kronecker_fit.SOLVES", 200)
    modes, matrix, gram = family(16, 16, 2), _weight(16, 16), _gram(16)
    running = Fit(matrix, modes, whitening(gram, modes), 3)
    residual = running._improve_second()
    assert float(running._residual().norm()) < 1e-3 * float((running.first.t() @ running._target).norm()) and float(residual.norm()) < 1e-3


@pytest.mark.parametrize("t", [2, 4, 8])
def test_singular_grams(t: int) -> None:
    matrix, gram = _weight(32, 32), _gram(32, tokens=3)
    gram[5] = gram[:, 5] = 0  # a dead channel
    cores, error = fit(matrix, family(32, 32, t), 8, gram, 20)
    assert error < 0.1 and bool(torch.isfinite(cores.matrix()).all())
    cores, error = fit(matrix, family(32, 32, t), 8, torch.zeros(32, 32), 20)
    assert error == 0 and bool(torch.isfinite(cores.matrix()).all())


@pytest.mark.parametrize("seed", [3, 7, 102, 224, 261])
def test_massive_activations_do_not_hide_the_rest(seed: int) -> None:
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(seed)), dim=0)
    matrix, gram, modes = _weight(32, 32), _gram(32) + 1e5 * torch.outer(u, u), family(32, 32, 2)
    running = Fit(matrix, modes, whitening(gram, modes), 12)
    assert float(torch.linalg.eigvalsh(running.white.gram.double())[0]) > 0  # float32 rounds such a Gram to an indefinite one
    before = _error(running, matrix, gram)
    running.refine(10)
    assert _error(running, matrix, gram) < 0.7 * before and running.error**2 == pytest.approx(_error(running, matrix, gram) ** 2, abs=1e-5)


@pytest.mark.parametrize("mean", [1e3, 3e3, 1e4])
def test_inputs_far_from_zero_never_make_a_fit_worse(mean: float) -> None:
    """The float32 Gram of such inputs is indefinite by a hundredth of its mean after whitening and more."""
    for seed in range(11, 15):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(600, 64, generator=generator) + mean * torch.randn(1, 64, generator=generator)
        matrix, modes, gram, exact = _weight(48, 64), family(48, 64, 2), x.t() @ x / 600, x.double().t() @ x.double() / 600
        running = Fit(matrix, modes, whitening(gram, modes), 12)
        before = _error(running, matrix, exact)
        running.refine(20)
        assert _error(running, matrix, exact) < max(1.5 * before, 2e-3)


def test_energy_of_a_kronecker_gram_is_exact() -> None:
    modes, matrix = family(16, 16, 4), _weight(16, 16)
    gram = torch.kron(torch.eye(4) + 0.5, torch.eye(4) * 2 + 0.3)
    energy = whitened_energy(matrix, modes, whitening(gram, modes))
    assert float(energy.sum()) == pytest.approx(float(((matrix @ gram) * matrix).sum()), rel=1e-4)
    error = fit(matrix, modes, 5, gram, 0)[1]
    assert error == pytest.approx(float((energy[5:].sum() / energy.sum()) ** 0.5), rel=1e-3)


def test_rearranged_kronecker_products_have_rank_one() -> None:
    matrix = torch.kron(_weight(4, 3), _weight(5, 2))
    assert int(torch.linalg.matrix_rank(rearranged(matrix, Modes(a=4, b=3, c=5, d=2)))) == 1
