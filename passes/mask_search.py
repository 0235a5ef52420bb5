"""Which weights to keep, searched for all columns at once: alternating directions on a layer's output error under a sparsity constraint.

Source: Meng et al., "ALPS: improved optimization for highly sparse one-shot pruning for large language models", NeurIPS 2024 (arXiv 2406.07831), section 3.1:
minimise `(X - W) H (X - W)^T` over `X = Z`, Z sparse, by turns exactly in X and in Z (a projection: the largest entries of `X + V / rho` stay), while
the multipliers V and a growing penalty rho pull the two together. Columns are scaled to unit curvature first, so one rho suits every layer.

Here the start is a solution that exists already (SparseGPT's), and rho takes few values (doubling every `STAGE` rounds, up to 1), so that
`(H + rho I)^-1` is formed once for each, for all weights with the same input, and a round is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STAGE = 5
LEAST = 1 / 16  # value of rho


@dataclass(frozen=True)
class Proximal:
    """`scale: [K] f32` is the inverse root of the curvature; `hessian: [K, K] f32` has a unit diagonal; `stages` are rho, (H + rho I)^-1 and rounds."""

    scale: Tensor
    hessian: Tensor
    stages: tuple[tuple[float, Tensor, int], ...]


def proximal(hessian: Tensor, rounds: int) -> Proximal:
    """What `search_mask` needs of `hessian: [K, K] f32`, positive definite; inverses are taken in float64."""
    scale = hessian.diagonal().rsqrt()
    scaled = scale.unsqueeze(1) * hessian * scale
    spans = [min(STAGE, rounds - i) for i in range(0, rounds, STAGE)]
    penalties = [max(2.0 ** (i + 1 - len(spans)), LEAST) for i in range(len(spans))]
    return Proximal(scale, scaled, tuple((rho, _inverse(scaled, rho), span) for rho, span in zip(penalties, spans, strict=True)))


def _inverse(scaled: Tensor, rho: float) -> Tensor:
    h = scaled.double()
    h.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(h)).float()


def search_mask(matrix: Tensor, start: Tensor, terms: Proximal, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Sparse `[N, K] f32` near `matrix: [N, K] f32` under the Hessian, and its mask of removed weights `[N, K] bool`.

    `start` is a sparse solution; `choose` makes the mask from a score of every weight, removing low ones.
    """
    pull = (matrix / terms.scale) @ terms.hessian
    sparse, removed = start / terms.scale, start == 0
    multiplier = torch.zeros_like(sparse)
    for rho, inverse, rounds in terms.stages:
        for _ in range(rounds):
            dense = torch.add(pull, sparse, alpha=rho).sub_(multiplier) @ inverse
            ahead = torch.add(dense, multiplier, alpha=1 / rho)
            removed = choose(ahead.square())
            sparse = ahead.masked_fill(removed, 0.0)
            multiplier.add_(dense.sub_(sparse), alpha=rho)
    return sparse * terms.scale, removed
