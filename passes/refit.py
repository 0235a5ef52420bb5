"""Best values for the weights that stay, once it is settled which go: least squares under the input Gram, by conjugate gradients.

For every row `w` of a matrix, with the mask fixed, `(v - w) H (v - w)^T` over all `v` that are zero where removed is a convex quadratic. All rows are solved
at once: an iteration is one product with H, and it never makes a row worse (Hestenes & Stiefel, 1952; preconditioned by the diagonal of H).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30


def damped(gram: Tensor, damping: float) -> Tensor:
    """`gram: [K, K] f32` with `damping` times its mean diagonal added to the diagonal; columns no data ever reached get unit curvature first."""
    out = gram.clone()
    diagonal = out.diagonal()
    diagonal[diagonal == 0] = float(diagonal.mean()) or 1.0
    diagonal += damping * float(diagonal.mean())
    return out


def refit(matrix: Tensor, pruned: Tensor, removed: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """`pruned: [N, K] f32` after `steps` iterations towards `matrix` under `hessian: [K, K] f32`, positive definite; `removed: [N, K] bool` stays zero."""
    keep, curvature = ~removed, hessian.diagonal()
    out = pruned.clone()
    residual = ((matrix - pruned) @ hessian).mul_(keep)
    ahead = residual / curvature
    direction, power = ahead.clone(), (residual * ahead).sum(1, keepdim=True)
    for _ in range(steps):
        pushed = (direction @ hessian).mul_(keep)
        step = power / (direction * pushed).sum(1, keepdim=True).clamp_min(TINY)
        out.addcmul_(step, direction)
        residual.addcmul_(step, pushed, value=-1.0)
        ahead = torch.div(residual, curvature)
        before, power = power, (residual * ahead).sum(1, keepdim=True)
        direction = torch.addcmul(ahead, power / before.clamp_min(TINY), direction)
    return out
