"""The best partition of sorted weighted points into K runs: one-dimensional weighted k-means, solved exactly.

In one dimension clusters are runs of the sorted points, so the optimum is a shortest path with K edges. The least cost is convex in K, because a run's
cost satisfies the quadrangle inequality; so with the right price for a run, the cheapest path of any length has K runs (Aggarwal, Schieber and
Tokuyama, 1993). `price_path` finds the cheapest path at a price; `best_runs` finds the price by secants on the costs of two paths, which are exact
slopes of the convex curve, and where the curve is straight around K it splices the two paths. A handful of linear sweeps replaces K layers.

`w, s, q: [n + 1] f64` are prefix sums of weight, weight * x, weight * x^2; a run `(i, j]` costs `q - s^2 / w` of the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

Array = Any  # numpy arrays inside compiled code
Function = TypeVar("Function", bound=Callable[..., Any])
BIG = 1e300
ATTEMPTS = 200


def compiled(function: Function) -> Function:
    """Machine code for a function of arrays and numbers, kept on disk; runs without the interpreter's lock, divides without checks."""
    made: Function = njit(cache=True, error_model="numpy", nogil=True, fastmath={"contract", "nsz", "arcp"})(function)
    return made


@compiled
def run_cost(w: Array, s: Array, q: Array, i: int, j: int) -> float:
    """Weighted squared error of the points `i` to `j - 1` around their mean."""
    d = s[j] - s[i]
    return q[j] - q[i] - d * d / (w[j] - w[i])


@compiled
def total_cost(w: Array, s: Array, q: Array, edges: Array, runs: int) -> float:
    """Cost of the first `runs` runs between `edges`."""
    total = 0.0
    for k in range(runs):
        total += run_cost(w, s, q, edges[k], edges[k + 1])
    return total


@compiled
def _suffix(w: Array, s: Array, q: Array, suffix: Array, ends: Array, i: int, low: int, high: int) -> bool:
    """Best end of a run that starts at `i`, among `low` to `high`, tried from the right; False when the scan ran into `low` without proof."""
    wi, si, qi = w[i], s[i], q[i]
    best, end, j = BIG, high, high
    while j >= low and suffix[j] < best:  # suffix costs grow to the left, and a run costs at least nothing
        d = s[j] - si
        cost = suffix[j] + ((q[j] - qi) - d * d / (w[j] - wi))
        if cost < best:
            best, end = cost, j
        j -= 1
    suffix[i], ends[i] = best, end
    return j >= low


@compiled
def _between(w: Array, s: Array, q: Array, price: float, suffix: Array, ends: Array, left: int, right: int, block: int) -> None:
    """The starts between `left` and `right`, whose ends lie between those of the two; `block` is a power of two of at least `right - left`."""
    step = block
    while step > 1:
        half = step // 2
        for i in range(left + half, right, step):
            _suffix(w, s, q, suffix, ends, i, ends[i - half], ends[min(i + half, right)])
            suffix[i] += price
        step = half


@compiled
def price_path(w: Array, s: Array, q: Array, price: float, suffix: Array, ends: Array, edges: Array, block: int) -> int:
    """The cheapest path when every run costs `price` more: its `edges`, and how many runs it has.

    `suffix[i]` becomes the least cost of the points from `i` on, `ends[i]` where their first run ends. Ends never move right when starts move left, so
    starts go left in blocks: the leftmost of a block first, the others between their neighbours' ends.
    """
    n = len(w) - 1
    suffix[n], ends[n] = 0.0, n
    right = n
    while right > 0:
        left = max(0, right - block)
        if right > left + 1 and _suffix(w, s, q, suffix, ends, left, right, ends[right]):
            suffix[left] += price
            _between(w, s, q, price, suffix, ends, left, right, block)
        else:  # short runs: every start waits for the one to its right
            for i in range(right - 1, left - 1, -1):
                _suffix(w, s, q, suffix, ends, i, i + 1, ends[i + 1])
                suffix[i] += price
        right = left
    return _follow(ends, n, edges)


@compiled
def _follow(ends: Array, n: int, edges: Array) -> int:
    runs, i = 0, 0
    edges[0] = 0
    while i < n:
        i = ends[i]
        runs += 1
        edges[runs] = i
    return runs


@compiled
def _splice(few: Array, runs_few: int, many: Array, runs: int, edges: Array) -> None:
    """A path of `runs` runs from two that are cheapest at the same price: the start of `many`, then the end of `few` (the exchange keeps the sum)."""
    extra, i = runs - runs_few, 0
    while few[i + 1] < many[i + 1 + extra]:
        i += 1
    edges[: i + extra + 1] = many[: i + extra + 1]
    edges[i + extra + 1 : runs + 1] = few[i + 1 : runs_few + 1]


@compiled
def best_runs(w: Array, s: Array, q: Array, runs: int, price: float, edges: Array) -> float:
    """The optimal `edges: [runs + 1]` of more than `runs` points, and a price at which they are the cheapest path; `price` is a first guess."""
    n = len(w) - 1
    suffix, ends, path = np.empty(n + 1), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    few, many = np.zeros(n + 1, np.int64), np.arange(n + 1)
    few[1], count_few, count_many = n, 1, n
    cost_few, cost_many = run_cost(w, s, q, 0, n), 0.0
    secant, block = False, 4
    while block < min(64, n // (8 * runs)):
        block *= 2
    for attempt in range(ATTEMPTS):
        count = price_path(w, s, q, price, suffix, ends, path, block)
        if count == runs:
            edges[:] = path[: runs + 1]
            return price
        if secant and not count_few < count < count_many:
            break
        if count_few < count < runs:
            few[:], count_few, cost_few = path, count, total_cost(w, s, q, path, count)
        elif runs < count < count_many:
            many[:], count_many, cost_many = path, count, total_cost(w, s, q, path, count)
        slope = (cost_few - cost_many) / (count_many - count_few)
        secant = attempt > 3 or count_many - count_few <= 3
        price = slope if secant else price * (count / runs) ** 3.0
    _splice(few, count_few, many, runs, edges)
    return price


@compiled
def sweep(x: Array, w: Array, s: Array, edges: Array, sweeps: int) -> None:
    """Lloyd's iteration on prefix sums: move every edge to the middle between the means beside it, until none moves."""
    for _ in range(sweeps):
        moved = False
        for k in range(1, len(edges) - 1):
            a, b, c = edges[k - 1], edges[k], edges[k + 1]
            middle = 0.5 * ((s[b] - s[a]) / (w[b] - w[a]) + (s[c] - s[b]) / (w[c] - w[b]))
            place = a + 1 + np.searchsorted(x[a + 1 : c - 1], middle)
            if place != b:
                edges[k] = place
                moved = True
        if not moved:
            return
