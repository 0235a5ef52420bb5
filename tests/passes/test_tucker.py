"""Tucker-2: exact at full ranks, HOOI never worse than HOSVD, data-aware factors better on the data, ranks of noisy matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.tucker import Tucker2, decompose, energy_rank, evbmf_rank, hooi

KERNEL = torch.randn(12, 8, 9, generator=torch.Generator().manual_seed(0))


def _gram(tokens: int = 800) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(72, 72, generator=generator) * torch.logspace(0, -1.5, 72)
    x = torch.randn(tokens, 72, generator=generator) @ mix
    return x.t() @ x / tokens


def _error(found: Tucker2, gram: Tensor) -> float:
    delta = (found.kernel() - KERNEL).flatten(1)
    return float((((delta @ gram) * delta).sum() / ((KERNEL.flatten(1) @ gram) * KERNEL.flatten(1)).sum()) ** 0.5)


@pytest.mark.parametrize("gram", [None, _gram()])
def test_full_ranks_are_exact(gram: Tensor | None) -> None:
    found = decompose(KERNEL, 8, 12, gram)
    assert torch.allclose(found.kernel(), KERNEL, atol=1e-3 if gram is not None else 1e-5)
    assert found.reduce.shape == (8, 8) and found.core.shape == (12, 8, 9) and found.expand.shape == (12, 12)


@pytest.mark.parametrize("ranks", [(2, 3), (4, 6), (6, 9)])
def test_sweeps_do_not_raise_the_error(ranks: tuple[int, int]) -> None:
    k = KERNEL.double()
    outputs = torch.linalg.svd(k.flatten(1), full_matrices=False)[0][:, : ranks[1]]
    inputs = torch.linalg.svd(k.transpose(0, 1).flatten(1), full_matrices=False)[0][:, : ranks[0]]
    hosvd = torch.einsum("fcp,fo,ci->oip", k, outputs, inputs).square().sum()  # the energy kept: orthonormal factors
    better_in, better_out = hooi(KERNEL, *ranks)
    assert float(torch.einsum("fcp,fo,ci->oip", k, better_out, better_in).square().sum()) >= float(hosvd) - 1e-9


@pytest.mark.parametrize("ranks", [(3, 4), (5, 6)])
def test_factors_fitted_to_the_data_are_better_on_it(ranks: tuple[int, int]) -> None:
    gram = _gram()
    assert _error(decompose(KERNEL, *ranks, gram), gram) < 0.8 * _error(decompose(KERNEL, *ranks), gram)


def test_singular_grams() -> None:
    for gram in (_gram(3), torch.zeros(72, 72)):
        assert bool(torch.isfinite(decompose(KERNEL, 3, 4, gram).kernel()).all())


@pytest.mark.parametrize(("rank", "rows", "columns"), [(8, 60, 100), (20, 100, 200), (5, 100, 64)])
def test_components_above_the_noise_are_counted(rank: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    assert evbmf_rank(signal + 0.5 * torch.randn(rows, columns, generator=generator)) == rank
    assert evbmf_rank(torch.randn(rows, columns, generator=generator)) == 0


def test_energy_ranks() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [energy_rank(values, t) for t in (0.0, 0.4, 0.6, 0.99)] == [4, 3, 2, 1]
