"""Tables of values for one-dimensional data: where to start, Lloyd's sweeps, and the nearest entry of every value.

Lloyd's algorithm (S. P. Lloyd, 1982) on sorted data: clusters are runs, so a sweep is one binary search a boundary and two differences of prefix sums.
The start spreads the entries by the cube root of the density, which is optimal for many entries (P. F. Panter and W. Dite, 1951).
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 25
CHUNK = 2**22  # values worked on at a time


def fit_tables(samples: Tensor, entries: int, pin_zero: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Tables `[T, E] float32`, ascending, for `samples: [T, S] float`; where `pin_zero: [T] bool` one entry is exactly 0.

    A table whose samples have at most E distinct values holds these. An entry that no sample is nearest to keeps its place.
    """
    chunk = max(1, CHUNK // max(samples.shape[1], 1))
    parts = zip(samples.split(chunk), pin_zero.split(chunk), strict=True)
    return torch.cat([_fit_chunk(s.float(), entries, p, sweeps) for s, p in parts])


def _fit_chunk(samples: Tensor, entries: int, pin_zero: Tensor, sweeps: int) -> Tensor:
    ordered = samples.sort(1).values
    tables = _start(ordered, entries)
    pinned = _nearest_to_zero(tables, pin_zero)
    tables = tables.masked_fill(pinned, 0.0)
    totals = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    for _ in range(sweeps):
        moved = _means(ordered, totals, tables).masked_fill(pinned, 0.0)
        if torch.equal(moved, tables):
            break
        tables = moved
    tables = _exact_where_few(ordered, tables)
    return tables.masked_fill(_nearest_to_zero(tables, pin_zero), 0.0)


def _nearest_to_zero(tables: Tensor, wanted: Tensor) -> Tensor:
    """`[T, E] bool`: in the `wanted: [T] bool` tables, the entry nearest to 0."""
    nearest = tables.abs().argmin(1, keepdim=True)
    return torch.zeros_like(tables, dtype=torch.bool).scatter_(1, nearest, wanted.unsqueeze(1))


def _start(ordered: Tensor, entries: int) -> Tensor:
    """Samples `[T, E]` at even steps of the integral of the cube root of the density: gaps between sorted samples are one over the density."""
    steps = torch.nn.functional.pad(ordered.diff(dim=1).pow(2 / 3).cumsum(1), (1, 0))
    shares = (torch.arange(entries, device=ordered.device) + 0.5) / entries
    places = torch.searchsorted(steps, (steps[:, -1:] * shares).contiguous()).clamp_(max=ordered.shape[1] - 1)
    return ordered.gather(1, places)


def _means(ordered: Tensor, totals: Tensor, tables: Tensor) -> Tensor:
    """The mean of the samples nearest to each entry, `[T, E]`; an entry without samples stays."""
    middles = (tables[:, 1:] + tables[:, :-1]) / 2
    inside = torch.searchsorted(ordered, middles, right=True)
    borders = torch.nn.functional.pad(inside, (1, 1))
    borders[:, -1] = ordered.shape[1]
    counts = borders.diff(dim=1)
    means = (totals.gather(1, borders).diff(dim=1) / counts.clamp_min(1)).to(tables.dtype)
    return torch.where(counts > 0, means, tables).cummax(1).values  # rounding never disorders a table


def _exact_where_few(ordered: Tensor, tables: Tensor) -> Tensor:
    """Tables with the distinct samples themselves, the largest repeated, where there are at most E of them."""
    rank = torch.nn.functional.pad((ordered.diff(dim=1) != 0).cumsum(1), (1, 0))
    few = rank[:, -1:] < tables.shape[1]
    distinct = ordered[:, -1:].repeat(1, tables.shape[1]).scatter_(1, rank.clamp_max(tables.shape[1] - 1), ordered)
    return torch.where(few, distinct, tables)


def nearest_codes(matrix: Tensor, values: Tensor) -> Tensor:
    """Codes `[N, K] uint8` of the entries of `values: [N, E]` (any order) nearest to `matrix: [N, K]`; of two equally near ones the lower code."""
    limits, codes = _limits(values.float())
    chunk = max(1, CHUNK // max(matrix.shape[1], 1))
    rows = zip(matrix.split(chunk), limits.split(chunk), codes.split(chunk), strict=True)
    return torch.cat([code.gather(1, torch.searchsorted(limit, m.float().contiguous())).to(torch.uint8) for m, limit, code in rows])


def _limits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Upper limits `[N, E-1]`, inclusive, of the ranges nearest to the sorted entries, and these entries' codes `[N, E] int64` (equal ones: the lowest)."""
    ordered, codes = values.sort(dim=1, stable=True)
    codes = codes.gather(1, torch.searchsorted(ordered, ordered))
    middles = (ordered[:, 1:].double() + ordered[:, :-1].double()) / 2
    limits = middles.float()
    below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
    upper_wins = (limits.double() == middles) & (codes[:, 1:] < codes[:, :-1])
    return torch.where((limits.double() > middles) | upper_wins, below, limits), codes
