"""Convolution kernels as few channels, each filtered by the same few taps, and one mixing of what they give: Tucker along channels and positions.

`K[f, c, p] = sum_(j, r) mix[f, j, r] reduce[r, c] taps[j, p]`. A Tucker-2 kernel of Kim et al. (arXiv 1511.06530) keeps all positions of a small kernel; long
one-way kernels seldom need them all, least where inputs are smooth, or so short that most taps only see padding. Sharing the taps between channels, the metric
of both modes and the choice of ranks are ours; the sweeps are HOOI (De Lathauwer et al. 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kronecker_sum import roots
from .tucker import SWEEPS, Tucker2, hooi, leading


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Grams of channels `[C, C]` and of positions `[P, P]`, float64, None for the identity."""

    channels: Tensor | None = None
    positions: Tensor | None = None

    def roots(self, channels: int, positions: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Root and inverse root of both."""
        grams = ((self.channels, channels), (self.positions, positions))
        one, other = (roots(g) if g is not None else (torch.eye(n, dtype=torch.float64),) * 2 for g, n in grams)
        return one, other


@dataclass(frozen=True, kw_only=True)
class Taps:
    """`reduce: [Rc, C]`, `taps: [Rk, P]`, `mix: [F, Rk, Rc]`, float32."""

    reduce: Tensor
    taps: Tensor
    mix: Tensor

    def kernel(self) -> Tensor:
        """What they stand for, `[F, C, P]`."""
        return torch.einsum("fjr,rc,jp->fcp", self.mix, self.reduce, self.taps)


@dataclass(frozen=True)
class Whitened:
    """A kernel `[F, C, P]` under the metrics of its inputs, float64, with the inverse roots that lead back."""

    kernel: Tensor
    channels: Tensor
    positions: Tensor

    @staticmethod
    def of(kernel: Tensor, metrics: Metrics) -> Whitened:
        """Multiply both input modes by the roots of their Grams."""
        (root, inverse), (other, back) = metrics.roots(*kernel.shape[1:])
        return Whitened(torch.einsum("fcp,cd->fdp", kernel.double(), root) @ other, inverse, back)

    def tails(self) -> tuple[Tensor, Tensor]:
        """Shares of the energy that are lost with 1, 2, ... channels, `[C]`, and taps, `[P]`."""
        return _tail(self.kernel.transpose(0, 1)), _tail(self.kernel.permute(2, 0, 1))

    def taps(self, rank: int, taps: int) -> Taps:
        """`rank` channels and `taps` taps: HOSVD, then alternating sweeps."""
        k = self.kernel
        inputs, filters = leading(k.transpose(0, 1), rank), leading(k.permute(2, 0, 1), taps)
        for _ in range(SWEEPS):
            inputs = leading((k @ filters).transpose(0, 1), rank)
            filters = leading(torch.einsum("fcp,cr->pfr", k, inputs), taps)
        reduce, undo = _orthonormal(self.channels @ inputs)
        short, back = _orthonormal(self.positions @ filters)
        mix = torch.einsum("fcp,cr,pj,ra,jb->fba", k, inputs, filters, undo, back)
        return Taps(reduce=reduce.float(), taps=short.float(), mix=mix.float())

    def tucker2(self, rank_in: int, rank_out: int) -> Tucker2:
        """All positions, few channels on both sides."""
        inputs, outputs = hooi(self.kernel, rank_in, rank_out)
        reduce, undo = _orthonormal(self.channels @ inputs)
        core = torch.einsum("fcp,fo,cr,ra->oap", self.kernel, outputs, inputs, undo) @ self.positions
        return Tucker2(reduce=reduce.float(), core=core.float(), expand=outputs.float())


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows `[R, n]` of the span of `columns: [n, R]`, and what a core is multiplied by, `[R, R]`, to be the same with them."""
    basis, rest = torch.linalg.qr(columns)
    return basis.t().contiguous(), rest.t()


def _tail(unfolded: Tensor) -> Tensor:
    flat = unfolded.flatten(1)
    values = torch.linalg.eigvalsh(flat @ flat.t()).flip(0).clamp_min(0)
    return 1 - values.cumsum(0) / values.sum().clamp_min(1e-300)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a kernel `[rows, channels, positions]`; `reads` are the places of an input for each place of an output."""

    rows: int
    channels: int
    positions: int
    reads: float = 1.0

    def work(self, rank: int, taps: int) -> float:
        """Multiply-adds for each place of an output; `reduce` is left out where it keeps all channels."""
        reduce = self.reads * rank * self.channels if rank < self.channels else 0
        return reduce + rank * taps * (self.positions + self.rows)


def balanced(tails: tuple[Tensor, Tensor], sizes: Sizes, multiple: int, budget: float) -> tuple[int, int]:
    """Channels and taps that lose least energy among those whose multiply-adds are within the budget; (0, 0) where none are."""
    best, least = (0, 0), float("inf")
    for taps in _steps(sizes.positions, multiple):
        fitting = [r for r in _steps(sizes.channels, multiple) if sizes.work(r, taps) <= budget]
        if fitting and (lost := float(tails[0][fitting[-1] - 1] + tails[1][taps - 1])) < least:
            best, least = (fitting[-1], taps), lost
    return best


def within(tails: tuple[Tensor, Tensor], multiple: int, tolerance: float) -> tuple[int, int]:
    """The fewest channels and taps that each lose at most `tolerance^2` of the energy."""
    least = (next((r for r in _steps(len(t), multiple) if float(t[r - 1]) <= tolerance**2), len(t)) for t in tails)
    first, second = least
    return first, second


def _steps(size: int, multiple: int) -> list[int]:
    return [*range(multiple, size, multiple), size]
