"""Kullback-Leibler divergence of class logits from a teacher's with memory for one gradient, as `cross_entropy` does it for labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 21  # logits of one block of rows


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) over rows of logits `[..., C]`, in float32, times temperature squared (Hinton et al. 2015).

    The gradient is the student's alone: softmax of the student minus softmax of the teacher, times the temperature, over the number of rows.
    """
    rows = (t.reshape(-1, t.shape[-1]) for t in (student, teacher.detach()))
    return _Divergence.apply(*rows, temperature)  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    """Mean over the rows of logits `[N, C]`; the way forward also makes the gradient, block by block."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.slope = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = max(1, _BLOCK // max(1, student.shape[-1]))
        for start in range(0, len(student), step):
            block = slice(start, start + step)
            mine, theirs = (F.log_softmax(t[block].float() / temperature, -1) for t in (student, teacher))
            target = theirs.exp()
            total += torch.sub(theirs, mine, out=theirs).mul_(target).sum()
            if ctx.slope is not None:
                ctx.slope[block] = mine.exp_().sub_(target).mul_(temperature / len(student))
        return (total / len(student) * temperature**2).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        """The stored gradient, copied only when what follows the loss scales it."""
        return (ctx.slope if bool(upstream == 1) else (ctx.slope * upstream).to(ctx.slope.dtype)), None, None
