"""Divergence of logits: value and gradient against float64 autograd, over several blocks of rows, and upstream factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxpress.passes import divergence as module
from fxpress.passes.divergence import divergence

from ..tiny import randn


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 11), (1, 11)])
def test_value_and_gradient_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], temperature: float) -> None:
    monkeypatch.setattr(module, "_BLOCK", 33)  # three rows a block
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1) * 3
    exact = student.detach().double().requires_grad_()
    logs = [F.log_softmax(t.double() / temperature, -1) for t in (exact, teacher)]
    want = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean() * temperature**2
    (3 * want).backward()
    got = divergence(student, teacher, temperature)
    (3 * got).backward()
    assert got.dtype == torch.float32 and student.grad is not None and exact.grad is not None
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_equal_logits_and_half_precision() -> None:
    logits = randn(4, 9).bfloat16().requires_grad_()
    value = divergence(logits, logits)
    value.backward()
    assert abs(float(value.detach())) < 1e-6 and logits.grad is not None and logits.grad.dtype == torch.bfloat16 and not bool(logits.grad.any())


def test_without_gradients_none_is_made() -> None:
    assert not divergence(randn(4, 9), randn(4, 9, seed=1)).requires_grad
