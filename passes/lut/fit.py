"""From a weight to a table, codes and scales as they will be stored: clustering, then refinement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.formats.lut import Lut
from .kmeans import cluster_rows
from .lnq import Rows, solve_tables

THREADS = max(1, torch.get_num_threads())


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`matrix: [N, K] f32` to be held in `fmt`, errors weighted by `weights: [N, K]` (None: all alike).

    `kept: [N, K] bool` weights are stored elsewhere and cause no error; `pruned: [N, K] bool` ones must stay exactly zero. `parts` are the numbers of
    consecutive rows that share a Gram.
    """

    matrix: Tensor
    weights: Tensor | None
    kept: Tensor
    pruned: Tensor
    fmt: Lut
    parts: tuple[int, ...]

    @property
    def row_scale(self) -> Tensor | None:
        """Largest magnitude of every row's remaining weights, `[N]`, where rows share a table."""
        if self.fmt.rows_per_table == 1:
            return None
        scale = self.matrix.abs().masked_fill(self.kept, 0.0).amax(1)
        return torch.where(scale > 0, scale, 1.0)

    @property
    def pinned(self) -> bool:
        """Whether an entry of every table is kept at zero."""
        return bool(self.pruned.any())


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`codes: [N, K] uint8`, the stored `table` and `scale` (see `Lut.store`), and the ascending `values: [N, E] f32` they stand for."""

    codes: Tensor
    table: Tensor
    scale: Tensor | None
    values: Tensor

    def error(self, problem: Problem, grams: Sequence[Tensor]) -> float:
        """`sum (q - w) H (q - w)^T` over all rows."""
        return float(sum(rows.error(c, v).sum() for rows, c, v in _by_gram(problem, grams, self.codes, self.values)))


def fit_tables(problem: Problem) -> Fit:
    """Cluster what is left when kept and pruned weights are out; codes are the nearest stored entries."""
    left_out = problem.kept | problem.pruned
    weights = torch.ones_like(problem.matrix) if problem.weights is None else problem.weights
    empty = (weights.masked_fill(left_out, 0.0).sum(1, keepdim=True) == 0) & ~left_out.all(1, keepdim=True)
    weights = torch.where(empty, 1.0, weights).masked_fill(left_out, 0.0)  # rows that no datum reaches are clustered as they are
    scale = problem.row_scale
    normal = problem.matrix if scale is None else problem.matrix / scale.unsqueeze(1)
    counted = weights if scale is None else weights * scale.unsqueeze(1).square()
    free = problem.fmt.entries - problem.pinned
    tables = torch.cat([cluster_rows(m, w, free, threads=THREADS) for m, w in _by_table(problem.fmt, normal, counted)])
    if problem.pinned:
        tables = torch.cat([tables, torch.zeros(len(tables), 1)], 1)
    return _stored(problem, tables.sort(1).values, scale)


def _by_table(fmt: Lut, matrix: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows as they share tables, `[T, rows K]` at a time; a short last group comes alone."""
    width = fmt.rows_per_table or len(matrix)
    full = len(matrix) // width * width
    parts = [(matrix[:full], weights[:full], width), (matrix[full:], weights[full:], len(matrix) - full)]
    return [(m.reshape(-1, n * m.shape[1]), w.reshape(-1, n * m.shape[1])) for m, w, n in parts if len(m)]


def _stored(problem: Problem, tables: Tensor, scale: Tensor | None) -> Fit:
    """Round ascending tables to what is stored, and take the nearest codes; pruned weights take the entry at zero."""
    table, stored, values = problem.fmt.stored_values(tables, scale, *problem.matrix.shape)
    codes = problem.fmt.nearest(problem.matrix, values)
    if problem.pinned:
        codes = torch.where(problem.pruned, (values == 0).float().argmax(1, keepdim=True).to(torch.uint8), codes)
    return Fit(codes=codes, table=table, scale=stored, values=values)


def refine_tables(problem: Problem, fit: Fit, grams: Sequence[Tensor], *, rounds: int, cycles: int) -> Fit:
    """LNQ from `fit` on; each round's tables are rounded as stored before the codes descend, so the result is what the file holds."""
    best, least = fit, fit.error(problem, grams)
    for _ in range(rounds):
        fit = _descended(problem, _rounded(problem, fit, grams), grams, cycles)
        error = fit.error(problem, grams)
        if not 0 <= error < least:  # below 0: an undamped Gram that rounding made indefinite
            break
        best, least = fit, error
    return best


def _rounded(problem: Problem, fit: Fit, grams: Sequence[Tensor]) -> Fit:
    """Least-squares tables for the present codes, stored; codes keep their entries."""
    scale = problem.row_scale
    factor = torch.ones(len(problem.matrix)) if scale is None else scale
    parts = [rows.normal_equations(c, problem.fmt.entries) for rows, c, _ in _by_gram(problem, grams, fit.codes, fit.values)]
    left, right = (torch.cat(p) for p in zip(*parts, strict=True))
    left, right = _shared(problem.fmt, left * factor.double()[:, None, None].square()), _shared(problem.fmt, right * factor.double()[:, None])
    tables = (fit.values / factor.unsqueeze(1))[:: problem.fmt.rows_per_table or len(factor)]  # of the first row that shares each
    pinned = (tables == 0) if problem.pinned else torch.zeros_like(tables, dtype=torch.bool)
    tables, order = solve_tables(left, right, tables, pinned).sort(1)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    codes = problem.fmt.spread(places, len(factor)).gather(1, fit.codes.long()).to(torch.uint8)
    table, stored, values = problem.fmt.stored_values(tables, scale, *problem.matrix.shape)
    return Fit(codes=codes, table=table, scale=stored, values=values)


def _shared(fmt: Lut, rows: Tensor) -> Tensor:
    """Sums over the rows of every table: `[N, ...] -> [T, ...]`."""
    if fmt.rows_per_table == 1:
        return rows
    return torch.stack([part.sum(0) for part in rows.split(fmt.rows_per_table or len(rows))])


def _descended(problem: Problem, fit: Fit, grams: Sequence[Tensor], cycles: int) -> Fit:
    codes = torch.cat([rows.descend(c, v, cycles) for rows, c, v in _by_gram(problem, grams, fit.codes, fit.values)])
    return Fit(codes=codes, table=fit.table, scale=fit.scale, values=fit.values)


def _by_gram(problem: Problem, grams: Sequence[Tensor], codes: Tensor, values: Tensor) -> list[tuple[Rows, Tensor, Tensor]]:
    """Rows of each Gram with their codes and values."""
    frozen = problem.kept | problem.pruned
    out, start = [], 0
    for gram, count in zip(grams, problem.parts, strict=True):
        part = slice(start, start + count)
        out.append((Rows(matrix=problem.matrix[part], gram=gram, frozen=frozen[part], threads=THREADS), codes[part], values[part]))
        start += count
    return out
