"""Search widths: which prefix of every nested layer to keep under a budget of bytes, multiply-accumulates or measured seconds (Mix'n'Match with a search).

MatFormer (arXiv 2310.07707, appendix D.1) mixes widths that do not fall with depth and rise as little as they can. Of models that were not trained nested
that is the worst choice (the first layer is often the one that matters most), so here it is only one of the starts. Ours: the loss of cutting each layer alone
is measured at a few widths, an exact knapsack chooses among all, and exchanges between layers are tried with the true loss, measured, of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.errors import CalibrationError, PassError, SpecError
from ..ir.program import Program
from ..ir.spec import option
from ..ir.structure import Role, find_structure
from .base import Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .knapsack import choose
from .memory import Memory
from .nest import PLANNED
from .nesting.width_costs import Unit, width_costs
from .nesting.width_loss import WidthLoss, curve, single_losses
from .slice import cut_prefixes, nested_sites
from .structured.amounts import Limits, kept_decision
from .structured.groups import Group, find_groups

Counts = dict[Group, int]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Widths with what they take of the program's own amount, and their loss as predicted layer by layer and as measured."""

    widths: Counts
    share: float
    predicted: float
    measured: float
    start: str
    exchanges: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchWidths(Pass):
    """Slices every nested layer to widths of its own, so that the program takes `budget` (a share) of its own `unit` at the least loss.

    Widths are multiples of `multiple_of`, about `levels` a layer, none below `min_keep`. The loss of one layer cut alone is measured at `shares` of its
    width on `batches` calibration batches, that of whole models on as many; `exchanges` is how many moves between layers are tried.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True
    budget: float = option(gt=0.0, lt=1.0)
    unit: Unit = Unit.BYTES
    shares: tuple[float, ...] = (0.75, 0.5)
    levels: int = option(16, ge=2)
    multiple_of: int = option(8, ge=1)
    min_keep: float = option(0.1, ge=0.0, le=1.0)
    batches: int = option(2, ge=1)
    exchanges: int = option(24, ge=0)
    roles: tuple[Role, ...] = (Role.FFN,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares or any(not 0 < s < 1 for s in self.shares) or sorted(set(self.shares), reverse=True) != list(self.shares):
            raise SpecError(f"{self.name}: shares must fall and lie between 0 and 1, for example shares=[0.75,0.5]; got {list(self.shares)}")

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for every layer that gets narrower; the search is made here, and once for equal weights."""
        groups, skips = self._groups(program)
        if not groups:
            return Plan(pass_spec=self.to_spec(), decisions=(), skips=skips)
        found = self._search(program, groups, ctx)
        widths = found.widths
        whole = tuple(Skip(g.name, f"{g.role.value}: keeps all {g.size}") for g, w in widths.items() if w == g.size)
        ctx.remarks.append(
            f"{found.share:.1%} of the program's {self.unit.value}; loss predicted {found.predicted:.4g}, measured {found.measured:.4g} "
            f"(from {found.start}, {found.exchanges} exchanges)"
        )
        return Plan(
            pass_spec=self.to_spec(), decisions=tuple(kept_decision(g, w, "the first ") for g, w in widths.items() if w < g.size), skips=(*skips, *whole)
        )

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Cut."""
        cut_prefixes(program, plan, self.roles)

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Cut, as `slice` does."""
        cut_prefixes(program, plan, self.roles)
        return plan.carried_out()

    def _groups(self, program: Program) -> tuple[list[Group], tuple[Skip, ...]]:
        groups = find_groups(program, find_structure(program), self.roles)
        ordered = nested_sites(program)
        reasons = {g: self.why_unnamed(g.name) for g in groups}
        reasons |= {g: "its units are in no order of importance; put nest before" for g in groups if not any(c.site.name in ordered for c in g.consumers)}
        return [g for g in groups if reasons[g] is None], tuple(Skip(g.name, why) for g, why in reasons.items() if why is not None)

    def _search(self, program: Program, groups: Sequence[Group], ctx: Context) -> Found:
        if not ctx.calibration:
            raise CalibrationError(f"{self.name} needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
        key = f"widths {self.to_spec()}"
        known: Found | None = ctx.memory.recall(key, program)
        if known is not None:
            by_name = {g.name: g for g in groups}
            return Found(**{**vars(known), "widths": {by_name[g.name]: w for g, w in known.widths.items()}})
        ahead = any(c.why == PLANNED for c in program.journal.changes)
        return ctx.memory.keep(key, program, (_Ahead if ahead else Search)(self, program, groups, ctx).run(self.budget))


class Search:
    """Losses and costs of one nested program, for as many budgets as one likes."""

    def __init__(self, options: SearchWidths, program: Program, groups: Sequence[Group], ctx: Context) -> None:
        self.options, self.groups = options, list(groups)
        self.loss = WidthLoss(program, groups, ctx, options.batches)
        limits = Limits(multiple_of=options.multiple_of, min_keep=options.min_keep)
        self.grid = {g: _thinned(limits.counts(g), options.levels) for g in groups}
        self.total, self.costs = width_costs(program, self.grid, options.unit, ctx)
        alone = single_losses(self.loss, program, groups, options.shares, ctx, options.batches)
        self.predicted = {g: [curve(options.shares, alone[g], w / g.size) for w in self.grid[g]] for g in groups}
        self._measured: dict[tuple[int, ...], float] = {}

    def run(self, budget: float) -> Found:
        """The best of the starts, then exchanges that lower the measured loss."""
        room = self.room(budget)
        ramps = {"equal shares": 0, "widths that rise with depth": 1, "widths that fall with depth": -1}
        starts = {"the knapsack": self.knapsack(room)} | {name: self.ramp(room, slope) for name, slope in ramps.items()}
        start = min(starts, key=lambda s: self.measured(starts[s]))
        best, made = self._exchange(starts[start], room)
        return self.found(best, start, made)

    def found(self, places: Mapping[Group, int], start: str, made: int) -> Found:
        """What places in the grid amount to."""
        widths = {g: self.grid[g][p] for g, p in places.items()}
        share = 1 - sum(self.costs[g][0] - self.costs[g][p] for g, p in places.items()) / self.total
        predicted = sum(self.predicted[g][p] for g, p in places.items())
        return Found(widths=widths, share=share, predicted=predicted, measured=self.measured(places), start=start, exchanges=made)

    def measured(self, places: Mapping[Group, int]) -> float:
        """The loss of the whole model, measured once for equal widths."""
        key = tuple(places[g] for g in self.groups)
        if key not in self._measured:
            self._measured[key] = self.loss({g: self.grid[g][p] for g, p in places.items()})
        return self._measured[key]

    def room(self, budget: float) -> int:
        """What the layers may take: the budget less everything else."""
        fixed = self.total - sum(self.costs[g][0] for g in self.groups)
        room, least = int(budget * self.total) - fixed, sum(min(c) for c in self.costs.values())
        if room < least:
            narrowest = f"{(fixed + least) / self.total:.1%} of the program's {self.options.unit.value}"
            raise PassError(
                f"{self.options.to_spec()}: the narrowest widths allowed take {narrowest}, more than the budget; raise the budget, lower min_keep, "
                "or slice heads and drop blocks too"
            )
        return room

    def knapsack(self, room: int) -> Counts:
        """The least total of the predicted losses, exactly."""
        taken = choose([self.predicted[g] for g in self.groups], [self.costs[g] for g in self.groups], room)
        return dict(zip(self.groups, taken, strict=True))

    def ramp(self, room: int, slope: float) -> Counts:
        """Shares `s + slope (depth - 1/2) / 2`, as large as fit: equal for a slope of 0, rising with depth for 1 (MatFormer's rule), falling for -1."""
        low, high = -1.0, 2.0
        for _ in range(40):
            middle = (low + high) / 2
            fits = self._cost(self._at(middle, slope)) <= room
            low, high = (middle, high) if fits else (low, middle)
        return self._at(low, slope)

    def _at(self, share: float, slope: float) -> Counts:
        last = max(1, len(self.groups) - 1)
        wanted = {g: share + slope * (n / last - 0.5) / 2 for n, g in enumerate(self.groups)}
        return {g: next((p for p, w in enumerate(self.grid[g]) if w <= wanted[g] * g.size), len(self.grid[g]) - 1) for g in self.groups}

    def _cost(self, places: Mapping[Group, int]) -> int:
        return sum(self.costs[g][p] for g, p in places.items())

    def _exchange(self, places: Counts, room: int) -> tuple[Counts, int]:
        """Moves of one step up in one layer and as many down in another as it takes, the most promising first, kept where the measured loss falls."""
        best, made, tried = dict(places), 0, set[tuple[Group, Group]]()
        for _ in range(self.options.exchanges):
            moves = [m for m in self._moves(best, room) if m[1:3] not in tried]
            if not moves:
                break
            _, up, down, moved = min(moves, key=lambda m: m[0])
            tried.add((up, down))
            if self.measured(moved) < self.measured(best):
                best, made = moved, made + 1
                tried = {pair for pair in tried if up not in pair and down not in pair}
        return best, made

    def _moves(self, places: Counts, room: int) -> list[tuple[float, Group, Group, Counts]]:
        """Every pair of layers, with the change of the predicted loss."""
        found = []
        for up in [g for g in self.groups if places[g] > 0]:
            raised = {**places, up: places[up] - 1}
            for down in [g for g in self.groups if g is not up]:
                moved = self._lowered(raised, down, room)
                if moved is not None:
                    change = sum(self.predicted[g][moved[g]] - self.predicted[g][places[g]] for g in (up, down))
                    found.append((change, up, down, moved))
        return found

    def _lowered(self, places: Counts, down: Group, room: int) -> Counts | None:
        missing = self._cost(places) - room
        for place in range(places[down], len(self.grid[down])):
            if self.costs[down][places[down]] - self.costs[down][place] >= missing:
                return {**places, down: place} if place > places[down] or missing <= 0 else None
        return None


class _Ahead(Search):
    """What is planned before `nest` has put units in order: equal shares, nothing measured."""

    def __init__(self, options: SearchWidths, program: Program, groups: Sequence[Group], ctx: Context) -> None:
        super().__init__(options, program, groups, replace(ctx, calibration=(), checkpoint=None, memory=Memory()))

    def run(self, budget: float) -> Found:
        """Equal shares."""
        return self.found(self.ramp(self.room(budget), 0), "equal shares", 0)


def _thinned(counts: Sequence[int], levels: int) -> list[int]:
    """About `levels` of the legal counts, evenly, the full size first."""
    step = max(1, len(counts) // levels)
    return list(counts[::step])


def frontier(program: Program, budgets: Sequence[float], ctx: Context, options: SearchWidths) -> list[dict[str, float | str | list[int]]]:
    """The search at several budgets from one set of measurements, as plain data: shares, losses, widths, and the equal-share losses beside them."""
    groups, _ = options._groups(program)
    search = Search(options, program, groups, ctx)
    rows: list[dict[str, float | str | list[int]]] = []
    for budget in budgets:
        found, equal = search.run(budget), search.found(search.ramp(search.room(budget), 0), "equal shares", 0)
        rows.append({
            "budget": budget, "unit": options.unit.value, "share": found.share, "predicted": found.predicted, "measured": found.measured, "start": found.start,
            "widths": list(found.widths.values()), "equal_share": equal.share, "equal_measured": equal.measured,
        })  # fmt: skip
    return rows
