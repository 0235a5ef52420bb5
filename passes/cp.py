"""Canonical polyadic decompositions of convolution kernels by alternating least squares, with the size of cancelling terms bounded.

Sources: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015 (arXiv 1412.6553). At higher ranks the best
approximation may not exist: terms grow without bound and cancel (de Silva and Lim 2008), and fine-tuning them is unstable. A ridge on the factors, which
bounds the terms' norms (after Phan et al., ECCV 2020), is raised until the terms stay within a multiple of the kernel's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

SWEEPS = 200
LARGEST = 10.0  # norm of all terms together, over the kernel's: beyond it they mostly cancel
RIDGES = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean diagonal of each least-squares problem
STARTS = 4


@dataclass(frozen=True, kw_only=True)
class Canonical:
    """`factors`, one `[size, rank]` float64 for every mode: the tensor is the sum over ranks of the products of their columns."""

    factors: tuple[Tensor, ...]

    def tensor(self) -> Tensor:
        """What they stand for."""
        flat = self.factors[0] @ khatri_rao(self.factors[1:]).t()
        return flat.view(*(len(f) for f in self.factors))

    @property
    def terms(self) -> float:
        """Root of the summed squared norms of the terms."""
        return float(reduce(torch.mul, (f.square().sum(0) for f in self.factors)).sum().sqrt())


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columnwise Kronecker product of `[n_k, R]` tensors, `[prod n_k, R]`, the last index fastest."""
    return reduce(lambda a, b: (a.unsqueeze(1) * b.unsqueeze(0)).flatten(0, 1), factors)


def decompose(tensor: Tensor, rank: int, generator: torch.Generator, largest: float = LARGEST) -> Canonical:
    """`rank` terms of `tensor`: the best of some starts under the least ridge that keeps the terms below `largest` times the tensor's norm."""
    t = tensor.double()
    for ridge in RIDGES:
        found = [Canonical(factors=tuple(_sweeps(t, _start(t, rank, generator), ridge))) for _ in range(STARTS)]
        bounded = [c for c in found if c.terms <= largest * float(t.norm()) or ridge == RIDGES[-1]]
        if bounded:
            break
    return min(bounded, key=lambda c: float((c.tensor() - t).norm()))


def _start(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of each unfolding, filled up with random columns."""
    made = []
    for mode in range(tensor.dim()):
        flat = tensor.movedim(mode, 0).flatten(1)
        left = torch.linalg.eigh(flat @ flat.t())[1].flip(1)[:, :rank]
        random = torch.randn(len(flat), rank - left.shape[1], generator=generator, dtype=torch.float64)
        made.append(torch.cat([left, random / max(len(flat), 1) ** 0.5], 1) + 0.05 * torch.randn(len(flat), rank, generator=generator, dtype=torch.float64))
    return made


def _sweeps(tensor: Tensor, factors: list[Tensor], ridge: float) -> list[Tensor]:
    factors, last = list(factors), float("inf")
    for _ in range(SWEEPS):
        for mode in range(tensor.dim()):
            others = [f for i, f in enumerate(factors) if i != mode]
            gram = reduce(torch.mul, (f.t() @ f for f in others))
            right = tensor.movedim(mode, 0).flatten(1) @ khatri_rao(others)
            damping = max(ridge * float(gram.diagonal().mean()), 1e-12)
            factors[mode] = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype), right.t()).t()
            factors = _balanced(factors)
        error = float((Canonical(factors=tuple(factors)).tensor() - tensor).norm())
        if last - error < 1e-6 * last:
            break
        last = error
    return factors


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same terms with columns of equal norm in every mode."""
    norms = [f.norm(dim=0).clamp_min(1e-150) for f in factors]
    mean = reduce(torch.mul, norms) ** (1 / len(factors))
    return [f * (mean / n) for f, n in zip(factors, norms, strict=True)]
