"""The multiple-choice knapsack, solved exactly: one choice an item, bytes within a budget, least total cost.

A dynamic programme over items keeps the Pareto front of `(bytes, cost)`. A state is also dropped when its cost plus the linear relaxation of the items that
remain (their lower convex hulls, filled in the order of saving per byte: Sinha & Zoltners 1979) is no better than the best solution known. That solution
comes from a greedy fill with repair, then from runs that keep only so many hopeful states; once a run has dropped none for being too many, what is known is
optimal, up to 1e-12 of the costs' magnitude. Equal inputs give equal answers.

Instances whose costs are all but proportional to irregular bytes may need more than `WIDEST` states for the proof. Memory stays bounded there: what is
returned is then proven to within the smallest of 1e-9, 1e-8, ... of its cost for which the states suffice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, inf, isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import PassError

Array = NDArray[Any]
WIDTH, WIDEST = 2**10, 2**16  # states the first run keeps, and the most any keeps; each further run keeps eight times as many
END_STATES = 2**15  # the front of the last items, made once, has at most so many
EXACT_FLOAT, EXACT_INT = 2**53, 2**62


def choose(costs: Sequence[Sequence[float]], values_bytes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Per item the index of the choice taken: total bytes `<= budget`, total cost minimal.

    `costs[i][c]` and `values_bytes[i][c] >= 0` are those of choice `c` of item `i`. An infinite cost forbids a choice. Raises `PassError` for inputs that do
    not fit together, an item whose every choice is forbidden, and a budget below the least reachable bytes.
    """
    items = [_item(i, c, b) for i, (c, b) in enumerate(_paired(costs, values_bytes))]
    least = sum(item.least for item in items)
    if least > budget:
        raise PassError(f"knapsack: no choice of {len(items)} items fits {budget:,} bytes; the least reachable is {least:,} bytes")
    return _solve([_within(item, budget - least) for item in items], budget - least)


@dataclass(frozen=True)
class _Item:
    """Choices worth taking, by rising bytes and falling cost: `label` in the caller's numbering, bytes above `least`, cost above the cheapest."""

    label: tuple[int, ...]
    least: int
    extra: tuple[int, ...]
    cost: tuple[float, ...]


def _paired(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> Iterator[tuple[list[float], list[int]]]:
    if len(costs) != len(sizes):
        raise PassError(f"knapsack: expected costs and bytes of the same items, got {len(costs)} and {len(sizes)}")
    for i, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        if len(cost) != len(size):
            raise PassError(f"knapsack: item {i} has {len(cost)} costs and {len(size)} sizes; give one of each a choice")
        yield [float(c) for c in cost], [int(s) for s in size]


def _item(number: int, costs: list[float], sizes: list[int]) -> _Item:
    bad = next((c for c in costs if isnan(c) or c == -inf), None)
    if bad is not None or min(sizes, default=0) < 0:
        raise PassError(f"knapsack: item {number} has a cost of {bad}" if bad is not None else f"knapsack: item {number} has negative bytes")
    kept: list[int] = []
    for c in sorted((c for c in range(len(costs)) if costs[c] < inf), key=lambda c: (sizes[c], costs[c], c)):
        if not kept or costs[c] < costs[kept[-1]]:
            kept.append(c)
    if not kept:
        raise PassError(f"knapsack: every choice of item {number} is forbidden (infinite cost); allow one")
    least, cheapest = sizes[kept[0]], costs[kept[-1]]
    return _Item(tuple(kept), least, tuple(sizes[c] - least for c in kept), tuple(costs[c] - cheapest for c in kept))


def _within(item: _Item, room: int) -> _Item:
    """Without the choices that never fit, costs again above the cheapest."""
    count = sum(x <= room for x in item.extra)
    return _Item(item.label[:count], item.least, item.extra[:count], tuple(c - item.cost[count - 1] for c in item.cost[:count]))


@dataclass(frozen=True)
class _Segment:
    """One edge of an item's lower convex hull: from choice `start` to `stop`, `extra` more bytes for `saving` less cost."""

    item: int
    start: int
    stop: int
    extra: int
    saving: float


def _hull(number: int, item: _Item) -> Iterator[_Segment]:
    at = 0
    while at < len(item.extra) - 1:
        rates = [(item.cost[at] - item.cost[c]) / (item.extra[c] - item.extra[at]) for c in range(at + 1, len(item.extra))]
        best = at + 1 + max(range(len(rates)), key=lambda i: (rates[i], i))
        yield _Segment(number, at, best, item.extra[best] - item.extra[at], item.cost[at] - item.cost[best])
        at = best


def _solve(items: list[_Item], room: int) -> list[int]:
    if sum(item.extra[-1] for item in items) <= room:
        return [item.label[-1] for item in items]
    unit = gcd(*(x for item in items for x in item.extra))
    room //= unit
    items = [_Item(i.label, i.least, tuple(x // unit for x in i.extra), i.cost) for i in items]
    segments = sorted((s for n, item in enumerate(items) for s in _hull(n, item)), key=lambda s: (-s.saving / s.extra, s.item, s.start))
    order = _order(items, segments, room)
    search = _Search([items[n] for n in order], _tails(items, segments, order), room)
    found = search.run([_greedy(items, segments, room)[n] for n in order])
    by_item = dict(zip(order, found, strict=True))
    return [item.label[by_item[n]] for n, item in enumerate(items)]


def _greedy(items: list[_Item], segments: list[_Segment], room: int) -> list[int]:
    """Take hull edges by saving per byte while they fit, then the best single change that fits until there is none."""
    taken = [0] * len(items)
    for s in segments:
        if taken[s.item] == s.start and s.extra <= room:
            taken[s.item], room = s.stop, room - s.extra
    while True:
        changes = [(item.cost[taken[n]] - item.cost[c], n, c) for n, item in enumerate(items) for c in range(len(item.extra))
                   if item.cost[c] < item.cost[taken[n]] and item.extra[c] - item.extra[taken[n]] <= room]  # fmt: skip
        if not changes:
            return taken
        _, n, c = max(changes, key=lambda change: (change[0], -change[1], -change[2]))
        room, taken[n] = room - items[n].extra[c] + items[n].extra[taken[n]], c


def _order(items: list[_Item], segments: list[_Segment], room: int) -> list[int]:
    """Clear-cut items first: those whose second-best choice is far from the best at the price a byte has in the relaxation."""
    price = 0.0
    for s in segments:
        price = s.saving / s.extra
        room -= s.extra
        if room < 0:
            break
    priced = [sorted(c + price * x for c, x in zip(item.cost, item.extra, strict=True)) for item in items]
    return sorted(range(len(items)), key=lambda n: priced[n][0] - priced[n][1] if len(priced[n]) > 1 else -inf)


def _tails(items: list[_Item], segments: list[_Segment], order: list[int]) -> list[tuple[Array, Array]]:
    """Per level the relaxation of the items after it: least cost at given bytes, as the corners of a falling convex line."""
    level = np.empty(len(items), dtype=np.int64)
    level[order] = np.arange(len(items))
    at = level[[s.item for s in segments]]
    extra, saving = np.array([float(s.extra) for s in segments]), np.array([s.saving for s in segments])
    dearest = np.array([items[n].cost[0] for n in order])
    tails = []
    for i in range(len(order)):
        later = at > i
        corners = np.concatenate([[0.0], np.cumsum(extra[later])])
        tails.append((corners, dearest[i + 1 :].sum() - np.concatenate([[0.0], np.cumsum(saving[later])])))
    return tails


@dataclass(frozen=True)
class _Front:
    """States no other beats, by rising bytes and falling cost, and per item taken so far the state each came from and its choice."""

    used: Array
    cost: Array
    steps: tuple[tuple[Array, Array], ...] = ()

    def trace(self, at: int) -> list[int]:
        """Choices of the items in the order they were added, that lead to the state at this index."""
        taken = []
        for parent, choice in reversed(self.steps):
            taken.append(int(choice[at]))
            at = int(parent[at])
        return taken[::-1]


class _Search:
    """Levels `0 .. head` go forwards under the bound; the front of the items after them is made once, and looked up to complete every state."""

    def __init__(self, items: list[_Item], tails: list[tuple[Array, Array]], room: int) -> None:
        dtype: Any = np.int64 if room < EXACT_INT else object
        self.extras = [np.array(item.extra, dtype=dtype) for item in items]
        self.costs = [np.array(item.cost) for item in items]
        self.tails, self.room = tails, room
        self.slack = 0.0 if room < EXACT_FLOAT else room * 1e-12  # keeps the bound a bound where floats round bytes
        self.rounding = 1e-12 * float(sum(c.max() for c in self.costs))
        self.start = _Front(np.zeros(1, dtype=dtype), np.zeros(1))
        self.head, self.end = len(items), self.start
        while self.head and len(self.end.used) * len(self.costs[self.head - 1]) <= END_STATES:
            self.head -= 1
            self.end = self._add(self.end, self.head)

    def run(self, known: list[int]) -> list[int]:
        """Choices of least cost; `known` are some that fit."""
        upper, width, complete, tolerance = self._cost(known), WIDTH, False, 0.0
        while not complete:
            found, complete = self._pass(upper - max(self.rounding, tolerance * upper), width)
            if found is not None:
                known, upper = found, self._cost(found)
            tolerance = tolerance if width < WIDEST else max(1e-9, 10 * tolerance)
            width = min(8 * width, WIDEST)
        return known

    def _cost(self, taken: list[int]) -> float:
        return sum(float(cost[c]) for cost, c in zip(self.costs, taken, strict=True))

    def _pass(self, upper: float, width: int) -> tuple[list[int] | None, bool]:
        """The cheapest choices below `upper` among the states kept, if any, and whether no state was dropped for width."""
        front, complete = self.start, True
        for level in range(self.head):
            front = self._add(front, level, upper)
            if len(front.used) > width:
                front, complete = _narrowed(front, self._hope(level, front.used, front.cost), width), False
        if not len(front.used):
            return None, complete
        partner = np.searchsorted(self.end.used, self.room - front.used, side="right") - 1
        total = front.cost + self.end.cost[partner]
        best = int(np.argmin(total))
        found = front.trace(best) + self.end.trace(int(partner[best]))[::-1]
        return (found if total[best] < upper else None), complete

    def _add(self, front: _Front, level: int, upper: float | None = None) -> _Front:
        """The front with one item more; with `upper`, without the states whose bound is not below it."""
        states = (self.extras[level][:, None] + front.used).ravel()
        total = (self.costs[level][:, None] + front.cost).ravel()
        fits = states <= self.room
        keep = np.flatnonzero(fits if upper is None else fits & (self._hope(level, states, total) < upper))
        keep = keep[_best_of(states[keep], total[keep])]
        parents = max(1, len(front.used))
        step = ((keep % parents).astype(np.int32), (keep // parents).astype(np.int16))
        return _Front(states[keep], total[keep], (*front.steps, step))

    def _hope(self, level: int, states: Array, total: Array) -> Array:
        """Lower bound of what each state can end in after this level."""
        return total + np.interp((self.room - states).astype(np.float64) + self.slack, *self.tails[level])


def _narrowed(front: _Front, hope: Array, width: int) -> _Front:
    """At most `width` states: half by least bound, half spread evenly, because where bounds tie, states of all sizes should go on."""
    kept = np.union1d(np.argsort(hope, kind="stable")[: width // 2], np.linspace(0, len(hope) - 1, width // 2).astype(np.int64))
    parent, choice = front.steps[-1]
    return _Front(front.used[kept], front.cost[kept], (*front.steps[:-1], (parent[kept], choice[kept])))


def _best_of(states: Array, total: Array) -> Array:
    """Indices of the states that no other equals or beats in both bytes and cost, by rising bytes."""
    by_cost = np.argsort(total, kind="stable")
    order = by_cost[np.argsort(states[by_cost], kind="stable")]
    ranked = total[order]
    before = np.concatenate([[inf], np.minimum.accumulate(ranked)[:-1]]) if len(ranked) else ranked
    return order[ranked < before]
