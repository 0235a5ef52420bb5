"""What column by column methods share: the Gram factored once for all sites with one input, and rows in slices of bounded memory.

GPTQ and SparseGPT change a weight one column after another and let the columns still to come absorb the error. By Cholesky factorization all they need of
the inverse Hessians of the remaining columns is one triangle (Frantar et al., arXiv 2210.17323, section 3, step 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import PassError
from ..ir.sites import WeightSite
from .calibrate import Statistics

SLICE_ELEMENTS = 2**22


@dataclass(frozen=True)
class ColumnSolver:
    """`order: [K]` visits columns; `upper: [K, K] f32` is the upper Cholesky factor of the inverse damped Gram in that order."""

    order: Tensor
    upper: Tensor


def factor(gram: Tensor, *, damping: float, act_order: bool, where: str) -> ColumnSolver:
    """Factor `gram: [K, K]` in float64; columns no data ever reached get unit curvature, so no other column moves with them."""
    h = gram.double()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = float(diagonal.mean()) or 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(h))
    h = h[order][:, order]
    jitter = damping * float(diagonal.mean())
    for _ in range(6):
        identity = torch.eye(len(h), dtype=h.dtype)
        # Factored from the last column backwards, H = R R^T with R upper triangular, so R^-1 is the upper factor of H^-1: no inverse of H is formed.
        backwards, failed = torch.linalg.cholesky_ex((h + jitter * identity).flip(0, 1))
        if not int(failed):
            return ColumnSolver(order, torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True).float())
        jitter *= 10
    raise PassError(f"{where}: the input Gram cannot be factored even with damping {jitter:g}; use more or cleaner calibration data")


def shared_solver(statistics: Statistics, group: int, *, damping: float, act_order: bool, where: str) -> ColumnSolver:
    """The factored Gram of a conv group (a linear has one group), made once for all sites that share the statistics."""
    assert statistics.gram is not None
    key = f"column solver {damping} {act_order} {group}"
    if key not in statistics.shared:
        statistics.shared[key] = factor(statistics.gram[group], damping=damping, act_order=act_order, where=where)
    solver: ColumnSolver = statistics.shared[key]
    return solver


def row_slices(site: WeightSite) -> Iterator[tuple[int, slice]]:
    """Conv group and rows of each slice; rows do not depend on each other, so a wide head is done in slices of bounded memory."""
    rows, step = site.rows // site.groups, max(1, SLICE_ELEMENTS // site.columns)
    for group in range(site.groups):
        for start in range(group * rows, (group + 1) * rows, step):
            yield group, slice(start, min(start + step, (group + 1) * rows))
