"""Cross entropy of class logits with memory for one gradient: nothing else as large as the logits is ever held.

A vocabulary makes logits the largest value of a small language model. `torch.nn.functional.cross_entropy` holds their log probabilities, the gradient
of those and, behind a slice, a padded copy; here each block of rows gives its losses and its gradient at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ir.errors import TrainingError

IGNORED = -100  # a class index that is left out
_BLOCK = 1 << 21  # logits of one block of rows


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy, in float32, of logits `[..., C]` and class indices `[...] int64`; -100 is left out, and nothing left is nan."""
    if target.shape != logits.shape[:-1]:
        raise TrainingError(f"target: expected class indices {list(logits.shape[:-1])} for logits {list(logits.shape)}, got {list(target.shape)}")
    wrong = (target != IGNORED) & ((target < 0) | (target >= logits.shape[-1]))
    if bool(wrong.any()):
        raise TrainingError(f"target: class {int(target[wrong][0])} is outside 0 to {logits.shape[-1] - 1} (use {IGNORED} to leave a position out)")
    return _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), target.flatten())  # type: ignore[no-untyped-call]


def next_token(logits: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean cross entropy of logits `[B, T, V]` at every position with the id that follows it in `ids: [B, T]`."""
    if ids.shape[1] < 2:
        raise TrainingError("next-token training needs at least 2 tokens a row")
    target = ids if keep is None else ids.masked_fill(~keep, IGNORED)
    return cross_entropy(logits, F.pad(target[:, 1:].long(), (0, 1), value=IGNORED))


class _CrossEntropy(torch.autograd.Function):
    """Mean over the kept rows of logits `[N, C]`; the way forward also makes the gradient, softmax minus one-hot over the number of kept rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        count = (target != IGNORED).sum()
        losses = torch.empty(len(target), dtype=torch.float32, device=logits.device)
        block = max(1, _BLOCK // max(1, logits.shape[-1]))
        for start in range(0, len(target), block):
            rows = slice(start, start + block)
            logs = F.log_softmax(logits[rows].float(), -1)
            losses[rows] = F.nll_loss(logs, target[rows], ignore_index=IGNORED, reduction="none")
            if ctx.slope is not None:
                ctx.slope[rows] = _slope(logs, target[rows]).div_(count)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        """The stored gradient, copied only when what follows the loss scales it."""
        return (ctx.slope if bool(upstream == 1) else (ctx.slope * upstream).to(ctx.slope.dtype)), None


def _slope(logs: Tensor, target: Tensor) -> Tensor:
    """Softmax minus one-hot for log probabilities `logs: [n, C]`, which are overwritten; zero in rows that are left out."""
    kept = target != IGNORED
    slope = logs.exp_()
    slope[kept.nonzero().flatten(), target[kept]] -= 1
    return slope.masked_fill_(~kept[:, None], 0)
