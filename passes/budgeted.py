"""Factorizations whose ranks may come from one budget over all of their sites: every site's spectrum is seen before any rank is decided."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.spec import option
from ..ir.weights import named_tensors
from .base import Decision, Need, Plan, SiteResult, Skip
from .calibrate import CalibrationWalk, Statistics, site_groups
from .context import Context
from .factorizing import Factorization
from .memory import Tensors, remembered
from .rank_budget import DENSE, Allocation, Curve, allocate
from .sensitivities import Sensitivities
from .structured.sensitivity import output_sensitivity

RANK = "rank"


@dataclass(frozen=True, kw_only=True)
class Budgeted(Factorization):
    """`budget` is the share of the parameters of all chosen sites that is kept; sites whose weight is worth more than any rank stay as they are."""

    budget: float | None = option(None, gt=0.0, le=1.0)
    allocation: Allocation = Allocation.LOSS

    @abstractmethod
    def at_rank(self, rank: int) -> Self:
        """The same pass with one rank and no budget."""

    @abstractmethod
    def unit(self, site: WeightSite) -> int:
        """Parameters a rank costs."""

    @property
    @abstractmethod
    def least(self) -> int:
        """The smallest rank; all ranks are multiples of it."""

    @property
    @abstractmethod
    def spectral(self) -> str:
        """Text of the options that spectra depend on."""

    @abstractmethod
    def gains(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, sensitivity: Tensor | None) -> Tensor:
        """`[R] float64`: output energy of the ranks one by one, per row; weighted by the outputs' `sensitivity: [N]` where given."""

    def refuse_unweighable(self, weight_only: bool) -> None:
        """Errors of the weight alone cannot count by the loss."""
        if self.budget is not None and weight_only and self.allocation is Allocation.LOSS:
            raise SpecError(f"{self.name}: metric=weight knows no outputs for the loss to mind; give allocation=equal, or metric=input with calibration data")

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """With a budget: spectra of all sites, then ranks."""
        if self.budget is None:
            return super().analyze(program, ctx)
        why = {s.name: self.why_skip(s) for s in program.sites()}
        sites = [s for s in program.sites() if why[s.name] is None]
        skips = [Skip(name, reason) for name, reason in why.items() if reason is not None]
        ranks = self._ranks(program, sites, ctx) if sites else {}
        skips += [Skip(s.name, f"stays as it is: within budget={self.budget} its weight is worth more than any rank") for s in sites if ranks[s.name] == DENSE]
        return Plan(pass_spec=self.to_spec(), decisions=tuple(self._decision(s, ranks[s.name], ctx) for s in sites if ranks[s.name]), skips=tuple(skips))

    def why_not(self, site: WeightSite) -> str | None:
        """As without a budget, at the smallest rank."""
        return super().why_not(site) if self.budget is None else self.at_rank(self.least).why_not(site)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Every site at its own rank."""
        if self.budget is None:
            super().preview(program, plan, ctx)
            return
        for decision in plan.decisions:
            self._twin(decision).preview(program, replace(plan, decisions=(decision,)), ctx)

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """At the rank that was decided."""
        if self.budget is None:
            return super().rewrite_site(editor, site, decision, statistics, ctx)
        return self._twin(decision).rewrite_site(editor, site, decision, statistics, ctx)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """What the chosen sites keep together."""
        if self.budget is None or not results:
            return ()
        before, after = (sum(getattr(r, f"bytes_{word}") for r in results) for word in ("before", "after"))
        return (f"budget: {len(results)} sites keep {after / before:.1%} of their weights; sites that stay as they are keep theirs",)

    def _twin(self, decision: Decision) -> Self:
        return self.at_rank(int(decision.facts[RANK]))

    def _decision(self, site: WeightSite, rank: int, ctx: Context) -> Decision:
        plan = self.at_rank(rank).decide(site, ctx)
        return replace(plan, facts={**plan.facts, RANK: float(rank)})

    def _ranks(self, program: Program, sites: list[WeightSite], ctx: Context) -> dict[str, int]:
        assert self.budget is not None
        if any(t.is_meta for _, t in named_tensors(program.graph_module)):  # an earlier pass of the recipe has still to run: sizes only, ranks follow then
            even = {s.name: int(self.budget * s.parameters / self.unit(s)) // self.least * self.least for s in sites}
            return {name: max(self.least, rank) for name, rank in even.items()}
        found = self.spectra(program, sites, ctx)
        curves = {s.name: Curve.of(found[s.name], unit=self.unit(s), dense=s.parameters) for s in sites}
        return allocate(curves, self.budget, self.least, self.to_spec())

    def spectra(self, program: Program, sites: list[WeightSite], ctx: Context) -> Tensors:
        """`gains` of all sites under the program as it stands; made once for all budgets of a run, and once over killed runs with a checkpoint."""

        def compute() -> Tensors:
            found = self._gains(program, sites, ctx)
            return found if self.allocation is Allocation.LOSS else {n: g / g.sum().clamp_min(1e-300) for n, g in found.items()}

        return remembered(ctx, f"{self.name}-spectra-{self.allocation.value}-{self.spectral}", [s.name for s in sites], program, compute)

    def _gains(self, program: Program, sites: list[WeightSite], ctx: Context) -> Tensors:
        minds = output_sensitivity(program, sites, ctx) if self.allocation is Allocation.LOSS else {}
        if self.needs is Need.NONE:
            return {s.name: self.gains(s, s.matrix().float(), None, minds.get(s.name)) for s in ctx.track(sites, f"{self.name}: spectra")}
        walk = CalibrationWalk(program, ctx.calibration)
        sensitivities = Sensitivities(program, sites, self.needs, self.guidance, ctx)
        found: dict[str, Tensor] = {}
        for group in ctx.track(site_groups(sites), f"{self.name}: spectra"):
            statistics = walk.statistics(group, self.needs)
            sensitivities.complete(statistics, walk, group)
            for site in group:
                gains = self.gains(site, site.matrix().float(), statistics, minds.get(site.name)).double()
                found[site.name] = torch.nan_to_num(gains).clamp_min(0.0) * statistics.tokens
        return found
