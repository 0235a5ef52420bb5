"""The measured order: asked once a shape, and always one of the two."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.chain import run
from fxpress.passes import contraction_order
from fxpress.passes.contraction_order import faster_first
from fxpress.passes.kronecker_sum import Modes, as_chain, fit


def test_the_faster_order_is_taken_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    contraction_order._faster.cache_clear()
    cores, _ = fit(torch.randn(24, 36), Modes(a=6, b=6, c=4, d=6), 5, None, 0)
    seconds = {"inner": 2.0}
    timed: list[int] = []

    def clock(chain: object, x: torch.Tensor) -> float:
        timed.append(len(x))
        return seconds["inner"] if len(timed) % 4 in (0, 1) else 1.0  # the runs alternate: second core first, then first, then the other way round

    monkeypatch.setattr(contraction_order, "_time", clock)
    orders = {faster_first(cores, 7, torch.float32) for _ in range(3)}
    assert len(timed) == 2 * (contraction_order.ROUNDS + 1) and set(timed) == {7} and len(orders) == 1


def test_both_orders_compute_the_same() -> None:
    cores, _ = fit(torch.randn(23, 35), Modes(a=6, b=6, c=4, d=6), 5, None, 0)
    x, bias = torch.randn(3, 35), torch.randn(23)
    results = [run(as_chain(cores, order), x, bias) for order in (True, False, None)]
    assert torch.allclose(results[0], results[1], atol=1e-4) and any(torch.equal(results[2], r) for r in results[:2])
    assert faster_first(cores, 3, torch.float32) in (True, False)
