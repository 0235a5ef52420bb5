"""Matrices as matrix product operators (tensor trains): exact decomposition by successive SVDs, truncation, and the discarded energy.

Sources: TT-SVD (Oseledets, SIAM J. Sci. Comput. 2011); for matrices Novikov et al. (NeurIPS 2015); as in CompactifAI (arXiv 2401.14109). With left-orthonormal
cores the squared error of a truncation is exactly the sum of all discarded squared singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Train:
    """`cores`, each `[r_(k-1), o_k, i_k, r_k]`, of a matrix `[prod o, prod i]` whose leading `rows x columns` count; `discarded`: squared error by bond."""

    cores: tuple[Tensor, ...]
    rows: int
    columns: int
    discarded: tuple[float, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(c.numel() for c in self.cores)

    @property
    def bonds(self) -> tuple[int, ...]:
        """Bond dimensions between the cores."""
        return tuple(c.shape[-1] for c in self.cores[:-1])

    def matrix(self) -> Tensor:
        """The matrix that the cores stand for."""
        return contract(self.cores)[: self.rows, : self.columns]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """`[prod o, prod i]` of cores `[r_(k-1), o_k, i_k, r_k]`, from the left, as products of matrices."""
    total = cores[0].squeeze(0)  # [o, i, r]
    for core in cores[1:]:
        rows, columns, bond = total.shape
        joined = total.reshape(rows * columns, bond) @ core.reshape(bond, -1)
        o, i, r = core.shape[1:]
        total = joined.view(rows, columns, o, i, r).permute(0, 2, 1, 3, 4).reshape(rows * o, columns * i, r)
    return total.squeeze(-1)


def full_bonds(outputs: Sequence[int], inputs: Sequence[int]) -> tuple[int, ...]:
    """Bond dimensions at which the decomposition is exact for any matrix: the smaller side of each cut."""
    sizes = [o * i for o, i in zip(outputs, inputs, strict=True)]
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))


def train_parameters(outputs: Sequence[int], inputs: Sequence[int], chi: int) -> int:
    """Numbers in the cores when every bond is `chi`, or what is exact where that is less."""
    bonds = (1, *(min(chi, b) for b in full_bonds(outputs, inputs)), 1)
    return sum(a * o * i * b for a, o, i, b in zip(bonds[:-1], outputs, inputs, bonds[1:], strict=True))


def decompose(matrix: Tensor, outputs: Sequence[int], inputs: Sequence[int], chi: int | Sequence[int] | None = None, tolerance: float = 0.0) -> Train:
    """Cores of `matrix: [N, K]` (zeros fill it up to the modes) in float64, bonds at most `chi`, or exactly those of a sequence.

    `tolerance` drops tails whose squares sum to at most `tolerance^2 |W|^2 / (n - 1)` at every bond, so that the whole relative error stays below it.
    """
    rows, columns = matrix.shape
    sites = len(outputs)
    w = F.pad(matrix.double(), (0, prod(inputs) - columns, 0, prod(outputs) - rows))
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = w.reshape(*outputs, *inputs).permute(order).reshape(1, -1)
    allowed = tolerance**2 * float(w.square().sum()) / max(sites - 1, 1)
    cores: list[Tensor] = []
    discarded: list[float] = []
    for o, i in list(zip(outputs, inputs, strict=True))[:-1]:
        bond = rest.shape[0]
        u, s, v = torch.linalg.svd(rest.reshape(bond * o * i, -1), full_matrices=False)
        keep = chi[len(cores)] if isinstance(chi, Sequence) else min(chi or len(s), _rank(s, allowed))
        cores.append(u[:, :keep].reshape(bond, o, i, keep))
        discarded.append(float(s[keep:].square().sum()))
        rest = s[:keep].unsqueeze(1) * v[:keep]
    cores.append(rest.reshape(rest.shape[0], outputs[-1], inputs[-1], 1))
    return Train(cores=tuple(cores), rows=rows, columns=columns, discarded=tuple(discarded))


def _rank(values: Tensor, allowed: float) -> int:
    """The fewest leading values whose tail's energy is at most `allowed`."""
    tail = values.square().flip(0).cumsum(0).flip(0)  # tail[r]: energy from r on
    return max(1, int((tail > max(allowed, 1e-28 * float(tail[0]))).sum()))
