"""Few channels under shared taps: exact where the kernel has them, better on the data under its metrics, and the ranks that lose least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.tucker_taps import Metrics, Sizes, Whitened, balanced, within

KERNEL = torch.randn(12, 10, 9, generator=torch.Generator().manual_seed(0))


def _gram(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1.5, size, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return turn.t() @ x.t() @ x @ turn / len(x)


METRICS = Metrics(channels=_gram(10, 1), positions=_gram(9, 2))


def _lost(delta: Tensor) -> float:
    """Energy of a kernel's error on data whose Gram is the product of both metrics."""
    d = delta.double()
    return float(torch.einsum("fcp,cd,pq,fdq->", d, METRICS.channels, METRICS.positions, d))


@pytest.mark.parametrize("metrics", [Metrics(), METRICS])
def test_full_ranks_are_exact(metrics: Metrics) -> None:
    found = Whitened.of(KERNEL, metrics).taps(10, 9)
    assert found.reduce.shape == (10, 10) and found.taps.shape == (9, 9) and found.mix.shape == (12, 9, 10)
    assert torch.allclose(found.kernel(), KERNEL, atol=1e-4)
    assert torch.allclose(Whitened.of(KERNEL, metrics).tucker2(10, 12).kernel(), KERNEL, atol=1e-4)


@pytest.mark.parametrize("metrics", [Metrics(), METRICS])
def test_a_kernel_that_has_few_taps_is_found(metrics: Metrics) -> None:
    generator = torch.Generator().manual_seed(3)
    mix, reduce, taps = (torch.randn(*s, generator=generator) for s in ((12, 2, 3), (3, 10), (2, 9)))
    kernel = torch.einsum("fjr,rc,jp->fcp", mix, reduce, taps)
    assert torch.allclose(Whitened.of(kernel, metrics).taps(3, 2).kernel(), kernel, atol=1e-3)


@pytest.mark.parametrize("ranks", [(3, 3), (6, 4)])
def test_metrics_help_on_the_data_and_tails_bound_the_loss(ranks: tuple[int, int]) -> None:
    whitened = Whitened.of(KERNEL, METRICS)
    lost = _lost(whitened.taps(*ranks).kernel() - KERNEL)
    assert lost < 0.8 * _lost(Whitened.of(KERNEL, Metrics()).taps(*ranks).kernel() - KERNEL)
    tails, power = whitened.tails(), _lost(KERNEL)
    each = [float(t[r - 1]) for t, r in zip(tails, ranks, strict=True)]
    assert max(each) * power <= lost * (1 + 1e-6) and lost <= sum(each) * power * (1 + 1e-6)  # HOSVD's bounds (De Lathauwer et al. 2000)


def test_ranks_lose_least_within_the_budget() -> None:
    tails, sizes = Whitened.of(KERNEL, METRICS).tails(), Sizes(rows=12, channels=10, positions=9, reads=2.0)
    for budget in (200.0, 500.0):
        rank, taps = balanced(tails, sizes, 1, budget)
        lost = float(tails[0][rank - 1] + tails[1][taps - 1])
        assert sizes.work(rank, taps) <= budget
        for r in range(1, 11):
            for j in range(1, 10):
                assert sizes.work(r, j) > budget or float(tails[0][r - 1] + tails[1][j - 1]) >= lost - 1e-12
    assert balanced(tails, sizes, 4, 700.0)[0] % 4 == 0 and balanced(tails, sizes, 1, 10.0) == (0, 0)
    assert sizes.work(10, 2) == 10 * 2 * (9 + 12) and sizes.work(5, 2) == 2 * 5 * 10 + 5 * 2 * (9 + 12)


def test_tolerances_bound_each_mode() -> None:
    tails = (torch.tensor([0.5, 0.2, 0.05, 0.0]), torch.tensor([0.02, 0.0]))
    assert within(tails, 1, 0.25) == (3, 1) and within(tails, 2, 0.25) == (4, 2) and within(tails, 1, 1e-6) == (4, 2)
