"""Truncated singular value decompositions of weights under the metric of their inputs and outputs, one decomposition for every rank.

For `W: [N, K]`, an input Gram `C: [K, K]` and output weights `d: [N]` the rank-r `W'` that minimises `sum_n d_n (W - W')_n C (W - W')_n^T` keeps the leading
left singular vectors U of `D^1/2 W C^1/2`: `W' = D^-1/2 U U^T D^1/2 W`. As a projection it needs no inverse of C, singular or not, and no square root of it
either: U are eigenvectors of `D^1/2 W C W^T D^1/2`. (SVD-LLM, arXiv 2403.07378, whitens by Cholesky and inverts; the result is the same where that exists.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """`left: [N, R]` orthonormal columns and `energy: [R]` squared singular values, falling, of the weighted matrix; `scale: [N]` is `d^1/2`. All float64."""

    left: Tensor
    energy: Tensor
    scale: Tensor
    matrix: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`down: [rank, K]` and `up: [N, rank]` float32, the matrix being about `up @ down`.

        Singular values stand in `down`, each in a row of its own: a quantizer's scale for every row absorbs them.
        """
        kept = self.left[:, :rank]
        return (kept.t() @ (self.scale.unsqueeze(1) * self.matrix)).float(), (kept / self.scale.unsqueeze(1)).float()

    def weighted_energy(self, weights: Tensor | None) -> Tensor:
        """`[R]`: the squared output error of dropping each component alone, each output counting by `weights: [N]` (None: by the metric's own).

        Components do not mix: their outputs are uncorrelated over the inputs, so dropping several costs the sum.
        """
        if weights is None:
            return self.energy
        return self.energy * (weights.double() @ (self.left / self.scale.unsqueeze(1)).square())

    def error(self, rank: int) -> float:
        """Relative output error that is left: the root of the discarded share of the energy."""
        total = float(self.energy.sum())
        return (float(self.energy[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0

    def rank_for(self, tolerance: float) -> int:
        """The smallest rank whose error is at most `tolerance`, 1 at least."""
        total = self.energy.sum()
        left = total - self.energy.cumsum(0)
        return min(1 + int((left > tolerance**2 * total).sum()), len(self.energy))


def spectrum(matrix: Tensor, gram: Tensor | None = None, weights: Tensor | None = None) -> Spectrum:
    """Decompose `matrix: [N, K]` under the input Gram `[K, K]` (None: the identity) and output weights `[N]` (None: ones; near zero: raised)."""
    w = matrix.double()
    scale = torch.ones(len(w), dtype=torch.float64) if weights is None else _positive(weights.double()).sqrt()
    a, basis = scale.unsqueeze(1) * w, None
    if a.shape[0] > a.shape[1]:
        basis, a = torch.linalg.qr(a)  # the eigenproblem is then as small as the smaller side
    energy, left = torch.linalg.eigh(a @ (gram.double() if gram is not None else torch.eye(a.shape[1], dtype=torch.float64)) @ a.t())
    energy, left = energy.flip(0).clamp_min(0.0), left.flip(1)
    return Spectrum(left=left if basis is None else basis @ left, energy=energy, scale=scale, matrix=w)


def _positive(weights: Tensor) -> Tensor:
    """Weights over their mean, those near zero raised: an output that the loss has not felt still has to be finite."""
    mean = float(weights.mean())
    return (weights / mean).clamp_min(1e-4) if mean > 0 else torch.ones_like(weights)
