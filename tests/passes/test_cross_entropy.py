"""Cross entropy and its gradient against the formula in double precision and against PyTorch's own, in blocks of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ir.errors import TrainingError
from fxpress.passes import cross_entropy as module
from fxpress.passes.cross_entropy import cross_entropy, next_token

from ..tiny import randn, tokens


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("block", [1, 14, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_value_and_gradient_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype, scale: float) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    logits, target = (4 * randn(3, 5, 7)).to(dtype).requires_grad_(), tokens(3, 5, 7)
    target[1, 2:] = -100
    ours, theirs = cross_entropy(logits, target), F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(_gradient(scale * ours, logits), _gradient(scale * theirs, logits))


def test_a_slope_is_good_for_a_second_sweep_back_and_nothing_is_kept_without_gradients() -> None:
    logits, target = randn(4, 3).requires_grad_(), torch.tensor([0, 2, 1, -100])
    loss = cross_entropy(logits, target)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], 3 * first)
    assert not cross_entropy(logits.detach(), target).requires_grad


def test_nothing_to_count_is_nan() -> None:
    assert cross_entropy(randn(2, 3), torch.tensor([-100, -100])).isnan()


def test_next_token_shifts_and_leaves_padding_out() -> None:
    logits, ids = randn(2, 5, 9), tokens(2, 5, 9)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    log = logits.double().log_softmax(-1)
    terms = [-log[b, t, ids[b, t + 1]] for b in range(2) for t in range(4) if keep[b, t + 1]]
    torch.testing.assert_close(next_token(logits, ids, keep).double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)
    everywhere = [-log[b, t, ids[b, t + 1]] for b in range(2) for t in range(4)]
    torch.testing.assert_close(next_token(logits, ids).double(), torch.stack(everywhere).mean(), rtol=1e-5, atol=0)
    with pytest.raises(TrainingError, match="at least 2 tokens"):
        next_token(logits[:, :1], ids[:, :1])


def test_targets_that_do_not_fit_are_refused() -> None:
    logits = randn(4, 3)
    with pytest.raises(TrainingError, match=r"expected class indices \[4\]"):
        cross_entropy(logits, torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TrainingError, match="class 3 is outside 0 to 2"):
        cross_entropy(logits, torch.tensor([0, 3, 1, 1]))
