"""Canonical polyadic decompositions of convolution kernels by alternating least squares, with the size of cancelling terms bounded.

Sources: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015 (arXiv 1412.6553). At higher ranks the best
approximation may not exist: terms grow without bound and cancel (de Silva and Lim 2008), and fine-tuning them is unstable. A ridge on the factors, which
bounds the terms' norms (after Phan et al., ECCV 2020), is raised until the terms stay within a multiple of the kernel's norm. Large tensors start once, from
terms that do not cancel (`_sliced`, ours), and get as many sweeps as `WORK` allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from .tucker import leading

SWEEPS = 200
LARGEST = 10.0  # norm of all terms together, over the kernel's: beyond it they mostly cancel
RIDGES = (1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean diagonal of each least-squares problem
STARTS = 4
WORK = 1e11  # multiply-adds of one decomposition, above which fewer starts and sweeps are made
FEWEST = 8  # sweeps


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
    """Columnwise Kronecker product of `[..., n_k, R]` tensors, `[..., prod n_k, R]`, the last index fastest."""
    return reduce(lambda a, b: (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2), factors)


def decompose(tensor: Tensor, rank: int, generator: torch.Generator, largest: float = LARGEST, starts: int = STARTS, sweeps: int = SWEEPS) -> Canonical:
    """`rank` terms of `tensor`: the best of some starts under the least ridge that keeps the terms below `largest` times the tensor's norm."""
    t = tensor.double()
    sweep = float(t.numel()) * rank * t.dim()
    few, large = min(sweeps, max(FEWEST, int(WORK / sweep))), starts * sweeps * sweep > WORK
    for ridge in RIDGES:
        begun = [_sliced(t, rank)] if large else [_start(t, rank, generator) for _ in range(starts)]
        found = [Canonical(factors=tuple(_sweeps(t, start, ridge, few))) for start in begun]
        bounded = [c for c in found if c.terms <= largest * float(t.norm()) or ridge == RIDGES[-1]]
        if bounded:
            break
    return bounded[0] if len(bounded) == 1 else min(bounded, key=lambda c: float((c.tensor() - t).norm()))


def _start(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of each unfolding, filled up with random columns."""
    made = []
    for mode in range(tensor.dim()):
        left = leading(tensor.movedim(mode, 0), rank)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
        random = draw(len(left), rank - left.shape[1]).to(left)
        made.append(torch.cat([left, random / max(len(left), 1) ** 0.5], 1) + 0.05 * draw(len(left), rank).to(left))
    return made


def _sliced(tensor: Tensor, rank: int) -> list[Tensor]:
    """Orthogonal terms: in the singular bases of all modes but the first two, the largest singular triples of the slices `[n_0, n_1]`."""
    bases = [leading(tensor.movedim(mode, 0), tensor.shape[mode]) for mode in range(2, tensor.dim())]
    turned = tensor
    for basis in bases:  # the axis in front moves to the back, so after all of them the order is the old one
        turned = torch.tensordot(turned, basis, dims=([2], [0]))
    left, values, right = torch.linalg.svd(turned.flatten(2).permute(2, 0, 1), full_matrices=False)
    best = values.flatten().topk(min(rank, values.numel())).indices
    slices, places = best // values.shape[1], best % values.shape[1]
    digits = torch.unravel_index(slices, tensor.shape[2:])
    found = [left[slices, :, places].t() * values[slices, places], right[slices, places].t(), *(b[:, d] for b, d in zip(bases, digits, strict=True))]
    return balanced([torch.nn.functional.pad(f, (0, rank - f.shape[1])) for f in found])


def _sweeps(tensor: Tensor, factors: list[Tensor], ridge: float, count: int) -> list[Tensor]:
    factors, last, power = list(factors), float("inf"), float(tensor.square().sum())
    for _ in range(count):
        for mode in range(tensor.dim()):
            gram = reduce(torch.mul, (f.t() @ f for i, f in enumerate(factors) if i != mode))
            right = _contracted(tensor, factors, mode)
            damping = max(ridge * float(gram.diagonal().mean()), 1e-30)
            new = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype), right.t()).t()
            left = power - 2 * float((new * right).sum()) + float((new.t() @ new * gram).sum())
            factors[mode] = new
            factors = balanced(factors)
        error = max(left, 0.0) ** 0.5
        if last - error < 1e-6 * last:
            break
        last = error
    return factors


def _contracted(tensor: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """`[n_mode, R]`: the tensor times every other mode's columns; the largest mode goes first, so that nothing large is made."""
    others = [i for i in range(tensor.dim()) if i != mode]
    first = max(others, key=lambda i: tensor.shape[i])
    if tensor.shape[mode] >= tensor.shape[first]:
        return tensor.movedim(mode, 0).flatten(1) @ khatri_rao([factors[i] for i in others])
    found = torch.tensordot(tensor.movedim(mode, 0), factors[first], dims=([1 + others.index(first)], [0]))  # [n_mode, the rest, R]
    for i in others:
        if i != first:
            found = (found * factors[i].view(len(factors[i]), *(1,) * (found.dim() - 3), -1)).sum(1)
    return found


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same terms, of factors `[..., n_k, R]`, with columns of equal norm in every mode."""
    norms = [f.norm(dim=-2, keepdim=True).clamp_min(1e-100) for f in factors]
    mean = reduce(torch.mul, norms) ** (1 / len(factors))
    return [f * (mean / n) for f, n in zip(factors, norms, strict=True)]
