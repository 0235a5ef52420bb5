"""SparseGPT: remove weights column by column and let the columns not yet visited absorb the error.

Source: Frantar & Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", ICML 2023 (arXiv 2301.00774), algorithm 1: with
U the upper Cholesky factor of the inverse damped Gram, the weights of smallest `w^2 / U_jj^2` go, chosen `block_size` columns at a time from the weights
as updated so far (N:M: in every group of M columns). Ours on top: `search` rounds for a better mask (see `mask_search`), and `refine` steps that
give the weights that stay their best values (see `refit`). With both 0 this is the published method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Need
from .calibrate import Statistics, why_not_observable
from .column_solver import row_slices, shared_solver
from .mask_search import Proximal, proximal, search_mask
from .pruning import Pruning
from .refit import damped, refit
from .relative import relative_error
from .removal import Removal, balanced, unstructured

LAZY = 128  # columns whose pushes onto the rest of the matrix are gathered into one product


@dataclass(frozen=True)
class _Terms:
    """Of one Gram: `upper: [K, K] f32` (see `ColumnSolver`), the damped `hessian: [K, K] f32`, and what `search_mask` needs."""

    upper: Tensor
    hessian: Tensor
    proximal: Proximal


@dataclass(frozen=True, kw_only=True)
class PruneSparsegpt(Pruning):
    """`weight: [N, K]` under the input Gram `[G, K, K]`; unstructured over each matrix (or conv group), or `pattern` N:M. Needs calibration data.

    Weights that are zero on entry stay zero and count towards the sparsity; then go those that no data reached.
    """

    damping: float = option(0.01, gt=0.0)
    block_size: int = option(128, ge=1)
    search: int = option(10, ge=0)
    refine: int = option(10, ge=0)
    sequential: bool = True

    @property
    def needs(self) -> Need:
        """The input Gram."""
        return Need.GRAM

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites pruned."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """As for all pruning; the site's rows must be observable."""
        return super().why_not(site) or why_not_observable(site)

    def flops(self, site: WeightSite) -> float:
        """The factorization, and a product with the Gram for the column loop and for every round and step."""
        return 2.0 * site.columns**3 + 2.0 * (1 + self.search + self.refine) * site.rows * site.columns**2

    def prune(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> tuple[Tensor, dict[str, float]]:
        """Prune slices of rows, each under the Gram of its conv group (a linear has one group)."""
        assert statistics is not None and statistics.gram is not None
        pruned = torch.empty_like(matrix)
        asked, error, power = 0, 0.0, 0.0
        for group, rows in row_slices(site) if self.pattern else _groups(site):
            gram, part = statistics.gram[group], matrix[rows].float()
            before, asked = asked, round(self.fraction * rows.stop * site.columns)
            removal = self._removal(part, gram.diagonal() == 0, asked - before)
            pruned[rows] = self._solve(part, self._terms(statistics, group, site), removal).to(matrix.dtype)
            error, power = error + _energy(pruned[rows].float() - part, gram), power + _energy(part, gram)
        return pruned, {"output_error": relative_error(error, power)}

    def _removal(self, part: Tensor, dead: Tensor, count: int) -> Removal:
        return balanced(part, dead, self.pattern) if self.pattern else unstructured(part, dead, count, self.block_size)

    def _terms(self, statistics: Statistics, group: int, site: WeightSite) -> _Terms:
        """Made once for all sites that share the statistics."""
        assert statistics.gram is not None
        key = f"{self.name} {self.damping} {self.search} {group}"
        if key not in statistics.shared:
            upper = shared_solver(statistics, group, damping=self.damping, act_order=False, where=f"{self.name} at {site}").upper
            hessian = damped(statistics.gram[group], self.damping)
            statistics.shared[key] = _Terms(upper, hessian, proximal(hessian, self.search))
        terms: _Terms = statistics.shared[key]
        return terms

    def _solve(self, matrix: Tensor, terms: _Terms, removal: Removal) -> Tensor:
        """`matrix: [N, K] f32` pruned; never worse under the damped Gram than what the column sweep alone finds."""
        pruned, removed = sweep(matrix, terms.upper, removal)
        if self.search:
            found, elsewhere = search_mask(matrix, pruned, terms.proximal, removal.of_matrix)
            found = refit(matrix, found, elsewhere, terms.hessian, self.refine)
            if _energy(found - matrix, terms.hessian) < _energy(pruned - matrix, terms.hessian):
                return found
        return refit(matrix, pruned, removed, terms.hessian, self.refine)


def sweep(matrix: Tensor, upper: Tensor, removal: Removal) -> tuple[Tensor, Tensor]:
    """`matrix: [N, K] f32` pruned in storage order, and the mask `[N, K] bool` of what was removed."""
    weights = matrix.t().clone(memory_format=torch.contiguous_format)  # [K, N]: a column of the weight is a contiguous row here
    pivots = upper.diagonal().unsqueeze(1)
    removed = torch.empty_like(weights, dtype=torch.bool)
    count, width, lazy = len(weights), removal.width, max(LAZY // removal.width, 1) * removal.width
    for start in range(0, count, lazy):
        stop = min(start + lazy, count)
        errors = torch.empty_like(weights[start:stop])
        for i in range(start, stop):
            done, pushed = errors[: i - start], upper[start:i]
            if i % width == 0:
                ahead = torch.addmm(weights[i : i + width], pushed[:, i : i + width].t(), done, alpha=-1.0)
                removed[i : i + width] = removal.of_columns((ahead / pivots[i : i + width]).square(), i)
            column = torch.addmv(weights[i], done.t(), pushed[:, i], alpha=-1.0)  # what this block's earlier columns push onto it
            weights[i] = column.masked_fill(removed[i], 0.0)
            torch.div(column.sub_(weights[i]), pivots[i], out=errors[i - start])
        weights[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    return weights.t().contiguous(), removed.t().contiguous()


def _groups(site: WeightSite) -> Iterator[tuple[int, slice]]:
    """Conv groups whole: an unstructured mask compares all rows of a group."""
    rows = site.rows // site.groups
    return ((group, slice(group * rows, (group + 1) * rows)) for group in range(site.groups))


def _energy(delta: Tensor, gram: Tensor) -> float:
    """`tr(D G D^T)`: the squared output error of weights that are off by `delta: [N, K] f32`."""
    return float(((delta @ gram) * delta).sum())
