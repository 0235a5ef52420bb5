"""Weighted k-means of matrix rows, each on its own: `sum_k f_k (w_k - table[code_k])^2` at its minimum, the objective of SqueezeLLM.

Source of the objective: Kim et al., "SqueezeLLM", ICML 2024 (arXiv 2306.07629), equation 6; they run scikit-learn's KMeans on every row. Here rows of up
to `EXACT` points are solved exactly (see `segments`); longer ones exactly on a grid of that many edges, then by Lloyd's iteration on prefix sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..threads import over_slices
from .segments import Array, best_runs, compiled, sweep

EXACT = 8192  # longer rows are solved on a grid of so many edges first
CHUNK_ELEMENTS = 2**16
COARSE = 24  # edges a run on the grid that the price is first looked for on
FLOOR = 1e-13  # a weight counts at least this share of its row's total: smaller ones vanish in the prefix sums


def cluster_rows(matrix: Tensor, weights: Tensor | None, entries: int, *, threads: int = 1) -> Tensor:
    """Optimal tables `[N, entries] f32`, ascending, for rows `matrix: [N, K]` with weights `[N, K]` of the squared errors (None: all equal).

    Points of weight 0 do not count (a row without any weight counts all equally). Rows with fewer distinct values than entries repeat their last one.
    """
    tables = torch.empty(matrix.shape[0], entries)

    def run(part: slice) -> None:
        given = None if weights is None else weights[part].detach().float().cpu().numpy()
        tables[part] = torch.from_numpy(_cluster(matrix[part].detach().float().cpu().numpy(), given, entries))

    over_slices(run, len(matrix), max(1, CHUNK_ELEMENTS // matrix.shape[1]), threads)
    return tables


def _cluster(matrix: Any, weights: Any, entries: int) -> Any:
    """Sort every row, then solve it; arrays in and out."""
    order, ranked = _sorted(matrix)
    ranks = np.ones_like(ranked) if weights is None else np.take_along_axis(weights, order, 1).astype(np.float64)
    out = np.empty((matrix.shape[0], entries))
    _solve_rows(ranked, ranks, out, EXACT)
    return out.astype(np.float32)


def _sorted(matrix: Any) -> tuple[Any, Any]:
    """Order `[N, K]` and sorted values `[N, K] f64`: values and places are sorted as one 64-bit key, several times faster than an argsort."""
    keys = np.empty(matrix.shape, np.int64)
    _make_keys(np.ascontiguousarray(matrix, np.float32).view(np.int32), keys)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys, np.take_along_axis(matrix, keys, 1).astype(np.float64)


@compiled
def _make_keys(bits: Array, keys: Array) -> None:
    """Floats sort like their bits, negative ones with all but the sign flipped."""
    for r in range(bits.shape[0]):
        for k in range(bits.shape[1]):
            value = np.int64(bits[r, k])
            keys[r, k] = ((value ^ 0x7FFFFFFF if value < 0 else value) << 32) | k


@compiled
def _solve_rows(x: Array, f: Array, out: Array, exact: int) -> None:
    """Tables of all rows; the scale of the price is carried from row to row."""
    n, runs = x.shape[1], out.shape[1]
    sums = np.zeros((3, n + 1))
    points = np.empty(n + 1)
    drift = np.ones(1)
    for r in range(len(x)):
        count = _prefix(x[r], f[r], points, sums)
        shift = points[count]
        if count <= runs:  # the values themselves, the last repeated
            out[r, :count] = points[:count] + shift
            out[r, count:] = out[r, count - 1]
            continue
        w, s, q = sums[0, : count + 1], sums[1, : count + 1], sums[2, : count + 1]
        edges = _edges(points[:count], w, s, q, runs, exact, drift)
        for k in range(runs):
            out[r, k] = (s[edges[k + 1]] - s[edges[k]]) / (w[edges[k + 1]] - w[edges[k]]) + shift


@compiled
def _prefix(x: Array, f: Array, points: Array, sums: Array) -> int:
    """Distinct centred points of positive weight into `points`, the centre behind them, prefix sums into `sums: [3, n + 1]`; returns how many.

    Equal weights become one point: checkpoints kept in 16 bits or less have many.
    """
    total = spread = 0.0
    for i in range(len(x)):
        total += f[i]
        spread += f[i] * x[i]
    every, share = total <= 0, 1 / total if total > 0 else 1 / len(x)
    mean = x.mean() if every else spread * share
    count, value = 0, np.nan
    weight = first = second = 0.0
    for i in range(len(x)):
        if every or f[i] > 0:
            mass, point = share if every else max(f[i] * share, FLOOR), x[i] - mean
            weight += mass
            first += mass * point
            second += mass * point * point
            count += x[i] != value
            value = x[i]
            points[count - 1] = point
            sums[0, count], sums[1, count], sums[2, count] = weight, first, second
    points[count] = mean
    return count


@compiled
def _edges(points: Array, w: Array, s: Array, q: Array, runs: int, exact: int, drift: Array) -> Array:
    """Edges of the best runs; of more than `exact` points first on a grid of edges, then by Lloyd's iteration over all points."""
    n, price = len(points), _price(points, w, runs)
    if n <= exact:
        return _optimal(w, s, q, runs, price, drift)
    stride = -(-n // exact)
    grid = np.minimum(np.arange(0, n + stride, stride), n)
    edges = grid[_optimal(w[grid], s[grid], q[grid], runs, price, drift)]
    sweep(points, w, s, edges, 200)
    return edges


@compiled
def _optimal(w: Array, s: Array, q: Array, runs: int, estimate: float, drift: Array) -> Array:
    """Edges `[runs + 1]` of the optimum. The price is found on a coarse grid of edges first; `drift`, its ratio to the estimate, is learnt over rows."""
    n = len(w) - 1
    price = estimate * drift[0]
    edges = np.empty(runs + 1, np.int64)
    stride = n // (COARSE * runs)
    if stride > 1:
        grid = np.minimum(np.arange(0, n + stride, stride), n)
        price = best_runs(w[grid], s[grid], q[grid], runs, price, edges)
    price = best_runs(w, s, q, runs, price, edges)
    drift[0] += 0.1 * (price / estimate - drift[0])
    return edges


@compiled
def _price(points: Array, w: Array, runs: int) -> float:
    """About what one more run saves: the derivative of Panter and Dite's high-resolution error `C / runs^2` (1951), from a coarse histogram."""
    n = len(points)
    bins = max(1, min(4 * runs, n // 4))
    root = 0.0
    for b in range(bins):
        i, j = b * n // bins, min((b + 1) * n // bins, n - 1)
        root += ((w[j] - w[i]) * (points[j] - points[i]) ** 2) ** (1 / 3)
    return max(root**3 / 6 / runs**3, 1e-300)
