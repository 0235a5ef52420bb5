"""What a planner chooses between: ways to hold a weight, what they cost and take, and how the ways of several weights combine into options of one item.

The choice itself is the multiple-choice knapsack (`passes.knapsack`): one option an item, amounts within the budget, least total cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from ...ir.errors import PassError
from ..knapsack import choose

WIDTH = 128  # combinations of a network's sites that are kept, hull points not counted


class Kind(Enum):
    """How the weights of a place are held."""

    DENSE = "dense"
    SVD = "svd"
    MPO = "mpo"
    TUCKER = "tucker"
    CP = "cp"
    SLICE = "slice"  # a feed-forward network with fewer hidden units


class Unit(Enum):
    """What a budget counts."""

    BYTES = "bytes"
    MACS = "macs"
    LATENCY = "latency"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to hold the weights of a `place` (a site, or the hidden class of a network).

    `action` says how: the spec of the pass that does it, or `keep k of n`. `cost` is what the planner minimises, `error` the relative output error, `nbytes`
    and `amount` (in the budget's unit; nanoseconds for latency) what the place then takes. `share` is the kept share that was asked for.
    """

    place: str
    kind: Kind
    action: str
    nbytes: int
    amount: int
    cost: float = 0.0
    error: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way for every place of an item, and what the item takes besides (`extra`: biases that only a slice makes smaller)."""

    ways: tuple[Way, ...]
    extra: int = 0

    @cached_property
    def cost(self) -> float:
        """Of all places together."""
        return sum(w.cost for w in self.ways)

    @cached_property
    def amount(self) -> int:
        """Of all places together."""
        return self.extra + sum(w.amount for w in self.ways)


def combined(parts: Sequence[Sequence[Way]], extra: int = 0) -> list[Option]:
    """Options of one item whose places choose freely: those that no other beats, thinned to the lower convex hull and `WIDTH` more.

    Options in which every place keeps the same share by the same kind always stay, so that a uniform pass is never out of reach.
    """
    options = [Option(ways=(), extra=extra)]
    for part in parts:
        options = thinned([Option(ways=(*o.ways, w), extra=extra) for o in options for w in part])
    return options + _uniform(parts, extra)


def _uniform(parts: Sequence[Sequence[Way]], extra: int) -> list[Option]:
    """One kind and share for all places; a place where that share leaves nothing stays dense."""
    pairs = sorted({(w.kind, w.share) for part in parts for w in part if w.kind is not Kind.DENSE}, key=lambda p: (p[0].value, p[1]))
    return [Option(ways=tuple(at_share(part, kind, share) for part in parts), extra=extra) for kind, share in pairs]


def at_share(part: Sequence[Way], kind: Kind, share: float) -> Way:
    """The place's way of this kind that keeps most within the share (equal ranks are listed once, under the least share); else its dense way."""
    fitting = [w for w in part if w.kind is kind and w.share <= share]
    return max(fitting, key=lambda w: w.share) if fitting else next(w for w in part if w.kind is Kind.DENSE)


def thinned(options: Sequence[Option], width: int = WIDTH) -> list[Option]:
    """The options that no other beats in amount and cost, by rising amount; of more than `width` the lower convex hull and some evenly between."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.amount, o.cost)):
        if not front or option.cost < front[-1].cost:
            front.append(option)
    if len(front) <= width:
        return front
    stay = {round(i * (len(front) - 1) / (width - 1)) for i in range(width)} | set(_hull(front))
    return [front[i] for i in sorted(stay)]


def _hull(front: Sequence[Option]) -> list[int]:
    """Corners of the lower convex hull of a front with rising amounts and falling costs."""
    corners: list[int] = []
    for i, option in enumerate(front):
        while len(corners) > 1 and _above(front[corners[-2]], front[corners[-1]], option):
            corners.pop()
        corners.append(i)
    return corners


def _above(a: Option, b: Option, c: Option) -> bool:
    return (b.cost - a.cost) * (c.amount - a.amount) >= (c.cost - a.cost) * (b.amount - a.amount)


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What a budget buys: shares of the program's amount asked for and reached, the total cost, and how many places are held in which kind."""

    budget: float
    reached: float
    cost: float
    kinds: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Everything a choice needs: `total` is what the program takes in `unit`, `fixed` the part that no choice changes."""

    unit: Unit
    total: int
    fixed: int
    items: tuple[tuple[Option, ...], ...]

    @property
    def floor(self) -> float:
        """The least share of the total within reach."""
        return (self.fixed + sum(min(o.amount for o in options) for options in self.items)) / self.total

    def choose(self, share: float) -> list[Option]:
        """One option an item: total at most `share` of the program's, least cost."""
        room = int(share * self.total + 1e-9) - self.fixed
        if room < self.floor * self.total - self.fixed - 1e-6:
            raise PassError(
                f"a budget of {share:.2%} of the program's {self.unit.value} is out of reach: {self.fixed / self.total:.2%} is held by what no choice changes, "
                f"and the least in reach is {self.floor:.2%}. Raise the budget, lower min_keep, or allow more candidates or sites"
            )
        costs, amounts = [[o.cost for o in options] for options in self.items], [[o.amount for o in options] for options in self.items]
        return [options[i] for options, i in zip(self.items, choose(costs, amounts, room), strict=True)]

    def reached(self, options: Sequence[Option]) -> float:
        """Share of the total that these options take."""
        return (self.fixed + sum(o.amount for o in options)) / self.total

    def point(self, share: float) -> FrontierPoint:
        """What this budget buys."""
        options = self.choose(share)
        kinds = Counter(w.kind.value for o in options for w in o.ways)
        return FrontierPoint(budget=share, reached=self.reached(options), cost=sum(o.cost for o in options), kinds=dict(sorted(kinds.items())))
