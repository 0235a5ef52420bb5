"""One budget of parameters over the ranks of many sites, spent where a parameter saves most of the expected loss.

Source: the greedy rule over layers and bonds for matrix product operators (our derivation, from CompactifAI's uneven layers, arXiv 2401.14109). A rank costs
the same number of parameters at one site, and its gain falls, so that taking the best gain per parameter first is optimal up to the last step. The
weight itself is a choice too, at its own size and without error; it breaks the fall of the gains, so the greedy runs along the lower convex hull.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

from ..ir.errors import PassError

DENSE = 0  # the rank of a site that stays as it is


class Allocation(Enum):
    """What an error at a site costs."""

    LOSS = "loss"  # the expected rise of the loss: squared output errors times mean squared output gradients
    EQUAL = "equal"  # its share of the site's own output energy: no gradients needed


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A site whose weight of `dense` parameters becomes one of rank r at `unit * r`; `tails: [R + 1] float64` is the loss left at ranks 0 to R."""

    unit: int
    dense: int
    tails: Tensor

    @staticmethod
    def of(gains: Tensor, *, unit: int, dense: int) -> Curve:
        """`gains: [R]` of the ranks one by one."""
        tails = gains.double().flip(0).cumsum(0).flip(0)
        return Curve(unit=unit, dense=dense, tails=torch.cat([tails, torch.zeros(1, dtype=torch.float64)]))

    def points(self, multiple: int) -> list[_Point]:
        """Choices by rising cost: ranks that are multiples of `multiple` and smaller than the weight, then the weight."""
        most = min((self.dense - 1) // self.unit, len(self.tails) - 1)
        ranks = range(multiple, most + 1, multiple)
        return [*(_Point(r, self.unit * r, float(self.tails[r])) for r in ranks), _Point(DENSE, self.dense, 0.0)]


@dataclass(frozen=True)
class _Point:
    rank: int
    cost: int
    loss: float


@dataclass(frozen=True)
class _Step:
    """A piece of a site's hull: from one choice to a later one, `slope` being the loss saved by a parameter."""

    slope: float
    site: str
    inside: tuple[_Point, ...]


def allocate(curves: Mapping[str, Curve], budget: float, multiple: int, what: str) -> dict[str, int]:
    """Ranks by site (`DENSE`: the weight stays) that keep at most the share `budget` of all weights; `what` names the pass in the refusal."""
    points = {name: c.points(multiple) for name, c in curves.items()}
    total = sum(c.dense for c in curves.values())
    floor = sum(p[0].cost for p in points.values())
    if floor > budget * total:
        raise PassError(
            f"{what}: budget={budget} of {total:,} parameters at {len(curves)} sites is below the floor: rank {multiple} at every site already holds "
            f"{floor:,}, a share of {floor / max(total, 1):.4f}; raise the budget, lower `multiple`, or leave sites out with skip"
        )
    room = int(budget * total + 1e-9 * total) - floor
    now = {name: p[0] for name, p in points.items()}
    closed: set[str] = set()
    for step in sorted((s for name, p in points.items() for s in _steps(name, p)), key=lambda s: (-s.slope, s.site)):
        if step.site in closed:
            continue
        fitting = [p for p in step.inside if p.cost - now[step.site].cost <= room]
        if fitting and fitting[-1].loss < now[step.site].loss:
            room -= fitting[-1].cost - now[step.site].cost
            now[step.site] = fitting[-1]
        if len(fitting) < len(step.inside):
            closed.add(step.site)
    return {name: p.rank for name, p in now.items()}


def _steps(site: str, points: list[_Point]) -> list[_Step]:
    """The pieces of the lower convex hull, steepest first."""
    hull = [0]
    for index in range(1, len(points)):
        while len(hull) > 1 and _slope(points[hull[-2]], points[hull[-1]]) <= _slope(points[hull[-1]], points[index]):
            hull.pop()
        hull.append(index)
    return [_Step(_slope(points[i], points[j]), site, tuple(points[i + 1 : j + 1])) for i, j in pairwise(hull)]


def _slope(first: _Point, second: _Point) -> float:
    return (first.loss - second.loss) / max(second.cost - first.cost, 1)
