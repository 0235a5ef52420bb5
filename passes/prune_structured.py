"""Structured pruning: remove whole FFN units, heads, key-value groups and channels, so that the model is smaller and faster as it stands.

What belongs together is read off the graph (`ir.axes`, `ir.structure`); no architecture is named anywhere. Importances and their sources are in
`structured.scores`, amounts in `structured.amounts`, what consumers do about the loss in `structured.compensate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ir.axes import analyze_axes
from ..ir.edit import Editor
from ..ir.errors import PassError, SpecError
from ..ir.program import Program
from ..ir.sites import SiteKind
from ..ir.spec import option
from ..ir.structure import Role, find_structure
from .base import Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .memory import remembered
from .structured.amounts import Counts, Limits, Ranking, Schedule, change, choose_indices, first_indices, kept_decision, ranked, refuse_budget, uniform
from .structured.budgets import Budget, measure
from .structured.compensate import Compensation, compensate, why_not
from .structured.groups import Group, cut, find_groups, pinned_skips
from .structured.scores import Importance, Scores, comparable, score_groups

DEFAULT_ROLES = (Role.FFN, Role.HEAD, Role.KV_GROUP, Role.CONV_OUT)


@dataclass(frozen=True, kw_only=True)
class PruneStructured(Pass):
    """Makes axis classes smaller until `ratio` of the prunable is gone or the model fits `parameters`, `macs` or `latency` (fractions of what it has).

    `ratio`: of every group's indices (`ranking=uniform`), or of the groups' parameters together (`global`). `latency` is measured on the example inputs.
    `roles` default to all of ffn, head, kv_group, conv_out the model has. `multiple_of` rounds what groups of units and channels keep (heads are counted
    one by one); `min_keep` is the fraction every group keeps at least. `only` and `skip` match class names such as `layers.0.mlp.up.weight[0]`.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True
    ratio: float | None = option(None, gt=0.0, lt=1.0)
    parameters: float | None = option(None, gt=0.0, lt=1.0)
    macs: float | None = option(None, gt=0.0, lt=1.0)
    latency: float | None = option(None, gt=0.0, lt=1.0)
    roles: tuple[Role, ...] = ()
    importance: Importance = Importance.OBS_FISHER
    compensation: Compensation = Compensation.AUTO
    ranking: Ranking = Ranking.GLOBAL
    multiple_of: int = option(8, ge=1)
    min_keep: float = option(0.1, ge=0.0, le=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(x is not None for x in (self.ratio, self.parameters, self.macs, self.latency)) != 1:
            raise SpecError(f"{self.name}: give exactly one of ratio, parameters, macs and latency, for example {self.name}{{ratio=0.3}}")

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision per group that loses something; a skip for every pinned class of a wanted role, and for groups that stay whole."""
        found = self._groups(program)
        counts = self._counts(program, found.groups, ctx) if found.groups else {}
        decisions = tuple(kept_decision(g, k) for g, k in counts.items() if k < g.size)
        whole = tuple(
            Skip(g.name, f"{g.role.value}: keeps all {g.size}: too important, or {g.size} is too few to round") for g, k in counts.items() if k == g.size
        )
        return Plan(pass_spec=self.to_spec(), decisions=decisions, skips=(*found.skips, *whole))

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Cut the sizes only: which indices go does not matter to later plans."""
        self._cut(program, first_indices(self._planned(self._groups(program).groups, plan)))

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Score, let the consumers make up for what goes, remove."""
        groups = self._groups(program).groups
        counts = self._planned(groups, plan)
        if not counts:
            return ()
        scores = self._scores(program, groups, ctx)
        kept = {g: choose_indices(scores[g], k) for g, k in counts.items()}
        before, work = program.parameters, next(iter(kept)).analysis.macs()
        errors: dict[str, float] = {}
        how = self._how(ctx)
        if how is not Compensation.OFF:
            with Editor(program, self.to_spec()) as editor:
                errors = compensate(editor, kept, how, ctx)
        self._cut(program, kept)
        left = analyze_axes(program).macs()
        ctx.remarks.append(f"parameters {change(before, program.parameters)}, multiply-accumulates {change(work, left)}")
        return tuple(_result(g, k, scores[g], errors) for g, k in kept.items())

    def _groups(self, program: Program) -> _Found:
        structure = find_structure(program)
        wanted = self.roles or DEFAULT_ROLES
        groups = find_groups(program, structure, wanted)
        skips = [Skip(g.name, why) for g in groups if (why := self.why_unnamed(g.name)) is not None]
        left_out = {s.site for s in skips}
        skips += pinned_skips(structure, wanted)
        present = {structure.role_of(c) for c in structure.analysis.classes}
        skips += [Skip("(model)", f"it has no {r.value}") for r in self.roles if r not in present]
        return _Found([g for g in groups if g.name not in left_out], tuple(skips))

    def _how(self, ctx: Context) -> Compensation:
        """The compensation this run takes."""
        if self.compensation is Compensation.AUTO:
            return Compensation.WEIGHTS if ctx.calibration else Compensation.OFF
        return self.compensation

    def _counts(self, program: Program, groups: list[Group], ctx: Context) -> Counts:
        limits = Limits(multiple_of=self.multiple_of, min_keep=self.min_keep)
        if self.ranking is Ranking.UNIFORM:
            schedule = uniform(groups, limits)
        else:
            scores = comparable(self._scores(program, groups, ctx), self.importance)
            by_work = self.macs is not None or self.latency is not None
            schedule = ranked(groups, limits, scores, lambda g: g.macs if by_work else g.parameters)
        return self._meet(program, groups, schedule, 0 if self._how(ctx) is Compensation.OFF else _new_biases(groups))

    def _meet(self, program: Program, groups: list[Group], schedule: Schedule, added: int) -> Counts:
        """Counts of the schedule that meet the ratio or the budget; `added` parameters come on top."""
        if self.ratio is not None and self.ranking is Ranking.UNIFORM:
            return schedule.at(round(self.ratio * schedule.levels))
        budget, target = self._budget()
        measured = measure(program, groups[0].analysis, budget)
        extra = added / groups[0].analysis.parameters() if self.parameters is not None else 0.0
        if self.ratio is not None:
            target = 1 - self.ratio * (1 - measured(dict.fromkeys(groups, 0)))

        def share(counts: Counts) -> float:
            return measured(counts) + extra

        counts = schedule.closest(lambda counts: share(counts) <= target)
        if counts is None:
            raise refuse_budget(f"{self.to_spec()}: {budget.value}", target, share(schedule.at(schedule.levels)))
        return counts

    def _budget(self) -> tuple[Budget, float]:
        for budget in Budget:
            if (target := getattr(self, budget.value)) is not None:
                return budget, float(target)
        return Budget.PARAMETERS, 0.0

    def _scores(self, program: Program, groups: list[Group], ctx: Context) -> Scores:
        """Scores of all groups, kept between planning and rewriting the same weights."""

        def compute() -> dict[str, Tensor]:
            return {g.name: s for g, s in score_groups(program, groups, self.importance, ctx).items()}

        known = remembered(ctx, f"scores-{self.importance.value}", [g.name for g in groups], program, compute)
        return {g: known[g.name] for g in groups}

    def _planned(self, groups: list[Group], plan: Plan) -> Counts:
        by_name = {g.name: g for g in groups}
        missing = [d.site for d in plan.decisions if d.site not in by_name]
        if missing:
            raise PassError(f"{self.name}: the plan names {missing[0]}, which this program does not have; plan again")
        return {by_name[d.site]: int(d.facts["kept"]) for d in plan.decisions}

    def _cut(self, program: Program, kept: Mapping[Group, Tensor]) -> None:
        cut(program, kept, self.to_spec(), f"structured pruning by {self.importance.value}")


@dataclass(frozen=True)
class _Found:
    groups: list[Group]
    skips: tuple[Skip, ...]


def _new_biases(groups: list[Group]) -> int:
    """Parameters that compensation may add: a bias for every consumer without one."""
    sites = {c.site.name: c.site for g in groups for c in g.consumers}.values()
    return sum(s.rows for s in sites if s.bias is None and s.kind is not SiteKind.MM and why_not(s) is None)


def _result(group: Group, kept: Tensor, scores: Tensor, errors: Mapping[str, float]) -> SiteResult:
    decision = kept_decision(group, len(kept))
    share = 1 - float(scores[kept].sum() / scores.sum().clamp_min(1e-30))
    mine = [errors[c.site.name] for c in group.consumers if c.site.name in errors]
    facts = dict(decision.facts) | {"importance_removed": share} | ({"output_error": max(mine)} if mine else {})
    return SiteResult(site=group.name, action=decision.action, bytes_before=decision.bytes_before, bytes_after=decision.bytes_after, facts=facts)
