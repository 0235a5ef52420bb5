"""How many indices each group keeps: by ratio or by budget, uniform or ranked over the whole model, in whole multiples, above a floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from ...ir.errors import PassError
from ..base import Decision
from .groups import Group

STEPS = 1000  # ratios a uniform budget search tries


class Ranking(Enum):
    """Whether every group loses the same fraction, or the least important indices of the whole model go first."""

    UNIFORM = "uniform"
    GLOBAL = "global"


Counts = dict[Group, int]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What every group must keep: `min_keep` of its indices (at least one); groups of at least `multiple_of` indices keep a multiple of it."""

    multiple_of: int = 1
    min_keep: float = 0.0

    def step(self, group: Group) -> int:
        """Indices that go together: groups smaller than two multiples are taken one by one."""
        return self.multiple_of if group.size >= 2 * self.multiple_of else 1

    def floor(self, group: Group) -> int:
        """Smallest legal count."""
        step = self.step(group)
        return min(group.size, max(step, ceil(self.min_keep * group.size / step) * step))

    def counts(self, group: Group) -> list[int]:
        """Legal counts, falling from the full size."""
        step, floor = self.step(group), self.floor(group)
        return [group.size, *(k for k in range((group.size - 1) // step * step, 0, -step) if k >= floor)]


@dataclass(frozen=True)
class Bundle:
    """One step of one group, from a legal count to the next: the score lost, and its rank (score a saved cost, never falling within a group)."""

    group: Group
    before: int
    kept: int
    loss: float
    rank: float


class Schedule:
    """Counts by level: level 0 keeps everything, every further level keeps less. `steps` are the bundles a ranked schedule chose from."""

    def __init__(self, levels: int, at: Callable[[int], Counts], steps: Sequence[Bundle] = ()) -> None:
        self.levels, self.at, self._steps = levels, at, steps

    def first(self, fits: Callable[[Counts], bool]) -> int | None:
        """The smallest level whose counts fit, by bisection; None when none does."""
        if not fits(self.at(self.levels)):
            return None
        low, high = 0, self.levels
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.at(middle)) else (middle + 1, high)
        return low

    def closest(self, fits: Callable[[Counts], bool]) -> Counts | None:
        """Counts that fit and lose little more than they must: one level short of the first that fits, the least costly single bundle that suffices."""
        level = self.first(fits)
        if level is None or level == 0:
            return None if level is None else self.at(0)
        short = self.at(level - 1)
        last = [b for b in sorted(self._steps, key=lambda b: b.loss) if b.before == short[b.group] and fits({**short, b.group: b.kept})]
        return {**short, last[0].group: last[0].kept} if last else self.at(level)


def uniform(groups: Sequence[Group], limits: Limits) -> Schedule:
    """Level `l` keeps the legal count nearest to `1 - l / STEPS` of every group."""

    def at(level: int) -> Counts:
        return {g: min(limits.counts(g), key=lambda k: (abs(k - g.size * (1 - level / STEPS)), -k)) for g in groups}

    return Schedule(STEPS, at)


def ranked(groups: Sequence[Group], limits: Limits, scores: Mapping[Group, Tensor], cost: Callable[[Group], int]) -> Schedule:
    """Level `l` removes the `l` bundles of least score per saved cost; a bundle leads from one legal count of a group to the next."""
    bundles = [b for group in groups for b in _bundles(group, limits, scores[group], cost(group))]
    bundles.sort(key=lambda b: b.rank)  # stable: ties fall in the order of the groups

    def at(level: int) -> Counts:
        counts = {g: g.size for g in groups}
        for bundle in bundles[:level]:
            counts[bundle.group] = min(counts[bundle.group], bundle.kept)
        return counts

    return Schedule(len(bundles), at, bundles)


def _bundles(group: Group, limits: Limits, scores: Tensor, cost: int) -> list[Bundle]:
    rising = scores.double().sort().values
    out: list[Bundle] = []
    for before, after in pairwise(limits.counts(group)):
        loss = float(rising[group.size - before : group.size - after].sum())
        rank = loss / max(1, cost * (before - after))
        out.append(Bundle(group, before, after, loss, max(rank, out[-1].rank) if out else rank))
    return out


def choose_indices(scores: Tensor, count: int) -> Tensor:
    """The `count` indices of highest score in rising order, `[count] int64`; ties keep the lower index."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def refuse_budget(name: str, target: float, best: float) -> PassError:
    """The error for a budget out of reach."""
    return PassError(
        f"{name} cannot reach {target:.1%} of the model: removing all it may leaves {best:.1%}. Raise the budget, add roles, or lower min_keep or multiple_of"
    )


def change(before: int, after: int) -> str:
    """Two amounts and the share that is left, for a report."""
    return f"{before:,} -> {after:,} ({after / before:.1%})"


def kept_decision(group: Group, kept: int, which: str = "") -> Decision:
    """Keep so many indices of the group, with what that saves; `which` says which ones."""
    saved, holds = (group.size - kept) * group.parameters, group.size * group.parameters
    facts = {"size": group.size, "kept": kept, "parameters_saved": saved, "macs_saved": (group.size - kept) * group.macs}
    action = f"{group.role.value}: keep {which}{kept} of {group.size}"
    return Decision(site=group.name, action=action, bytes_before=4 * holds, bytes_after=4 * (holds - saved), facts=facts)


def first_indices(counts: Counts) -> dict[Group, Tensor]:
    """Stand-ins where only sizes matter: the first indices of every group that loses some."""
    return {g: torch.arange(k) for g, k in counts.items() if k < g.size}
