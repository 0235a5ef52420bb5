"""Sums of Kronecker products: exact at full bond, chains equal the matrix, the family's identities, refinement under a Gram."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.chain import parameters, run
from fxpress.passes.kronecker_sum import Modes, as_chain, family, fit

TALL = Modes(a=3, b=8, c=8, d=3)  # the first core first is cheaper


def _gram(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(9))
    x = x * torch.logspace(0, -2, columns)
    return x.t() @ x / tokens


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("modes", [family(24, 24, t) for t in (1, 2, 4)] + [TALL, Modes(a=8, b=3, c=3, d=8), Modes(a=5, b=5, c=5, d=5)])
def test_full_bond_is_exact_and_the_chain_computes_it(modes: Modes) -> None:
    matrix, bias = _weight(24, 24), torch.randn(24)
    cores, error = fit(matrix, modes, modes.full, None, 0)
    assert error < 1e-6 and torch.allclose(cores.matrix(), matrix, atol=1e-5)
    chain = as_chain(cores)
    assert parameters(chain) == modes.parameters(modes.full)
    x = torch.randn(2, 5, 24)
    assert torch.allclose(run(chain, x, bias), x @ matrix.t() + bias, atol=1e-4) and torch.allclose(run(chain, x), x @ matrix.t(), atol=1e-4)


@pytest.mark.parametrize("modes", [family(23, 29, 4), TALL])
def test_a_truncated_chain_computes_its_matrix(modes: Modes) -> None:
    rows, columns = (23, 29) if modes is not TALL else (24, 24)
    cores, error = fit(_weight(rows, columns), modes, 5, None, 0)
    x = torch.randn(7, columns)
    assert 0.1 < error < 1 and torch.allclose(run(as_chain(cores), x), x @ cores.matrix().t(), atol=1e-4)


def test_every_member_of_the_family_holds_as_many_weights_and_does_t_times_the_work() -> None:
    for t in (1, 2, 4, 8):
        modes = family(64, 64, t)
        assert modes.parameters(10) == 2 * 10 * 64 and min(modes.multiplications(10)) == 2 * 10 * 64 * t


def test_the_weight_s_own_optimum_is_the_svd_of_the_rearrangement() -> None:
    matrix, modes = _weight(24, 24), family(24, 24, 4)
    rearranged = matrix.view(6, 4, 4, 6).transpose(1, 2).reshape(24, 24)
    values = torch.linalg.svdvals(rearranged.double())
    assert fit(matrix, modes, 10, None, 0)[1] == pytest.approx(float((values[10:].square().sum() / values.square().sum()) ** 0.5), rel=1e-5)


@pytest.mark.parametrize("t", [2, 4])
def test_refinement_under_the_data_is_what_matters(t: int) -> None:
    matrix, gram, modes = _weight(32, 32), _gram(32), family(32, 32, t)
    start, refined = fit(matrix, modes, 8, gram, 0)[1], fit(matrix, modes, 8, gram, 100)[1]
    plain = fit(matrix, modes, 8, None, 0)[0]
    delta = plain.matrix() - matrix
    unweighted = float((((delta @ gram) * delta).sum() / ((matrix @ gram) * matrix).sum()) ** 0.5)
    assert start <= unweighted + 1e-9 and refined < 0.75 * unweighted and refined <= start


def test_a_kronecker_product_is_found_where_the_pair_fails() -> None:
    matrix = torch.kron(_weight(8, 4), _weight(4, 8))
    gram = _gram(32)
    assert fit(matrix, family(32, 32, 4), 1, gram, 0)[1] < 1e-5 < 0.3 < fit(matrix, family(32, 32, 1), 1, gram, 0)[1]


def test_a_gram_of_fewer_tokens_than_channels() -> None:
    cores, error = fit(_weight(32, 32), family(32, 32, 4), 8, _gram(32, tokens=3), 50)
    assert error < 0.2 and bool(torch.isfinite(cores.matrix()).all())
