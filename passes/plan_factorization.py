"""One budget for a whole program: for every weight the factorization, and for every feed-forward network perhaps a smaller width, that costs the loss least.

Every way to hold a weight is judged on one scale, its output error on calibration data weighted by how much the loss minds errors there; what it takes is
bytes, multiply-accumulates or measured time; the best choice within the budget is found exactly. Ours; the parts and their sources are in `planning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.chain import Chain
from ..ir.edit import Editor
from ..ir.errors import CalibrationError, PassError
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip, parse_pass
from .context import Context
from .factorize_svd import Metric
from .factorizing import Factorization
from .memory import Tensors, remembered
from .planning.amounts import filled_chain, met, share_of
from .planning.candidates import Space, candidates, why_none
from .planning.carrier import Carrier
from .planning.choices import FrontierPoint, Kind, Option, Table, Unit, Way
from .planning.curves import Curves, error_curves
from .planning.networks import Network, find_networks
from .planning.remarks import compared, frontier_line, kinds_line, reached_line
from .planning.table import Scope, build_table
from .stage import run_stage
from .structured.amounts import Limits, choose_indices
from .structured.compensate import Compensation, compensate
from .structured.groups import Group, cut

SHARES = tuple(s / 10 for s in range(9, 0, -1))  # budgets of a frontier
KEEP = "keep "  # begins the action of a slice


class Weighting(Enum):
    """What errors are compared by."""

    LOSS = "loss"  # output errors weighted by the mean squared gradients of the loss
    OUTPUT = "output"  # squared relative output errors


@dataclass(frozen=True, kw_only=True)
class PlanFactorization(Pass):
    """Chooses for linears and convolutions among dense, low-rank pairs, two-site products, Tucker-2 and CP, and for feed-forward networks a smaller width.

    `budget` is a share of what the whole program takes: `unit=bytes` of all its weights and buffers, `macs` of one run on the example inputs, `latency` of the
    measured seconds of that run. `candidates` are the kinds to try; `steps` the kept shares of pairs and widths; ranks and widths are multiples of `multiple`
    and keep at least `min_keep` of their weight or width. Needs calibration data.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True
    budget: float = option(gt=0.0, le=1.0)
    unit: Unit = Unit.BYTES
    weighting: Weighting = Weighting.LOSS
    candidates: tuple[Kind, ...] = (Kind.SVD, Kind.MPO, Kind.TUCKER, Kind.CP, Kind.SLICE)
    steps: int = option(20, ge=2, le=100)
    multiple: int = option(1, ge=1)
    min_keep: float = option(0.05, ge=0.0, lt=1.0)
    refine: int = option(50, ge=0)
    sequential: bool = True

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """A decision for every weight and network that does not stay as it is, by the spec of the pass that carries it out or by the width it keeps."""
        known = self._know(program, ctx)
        if not known.table.items:
            return Plan(pass_spec=self.to_spec(), decisions=(), skips=known.skips)
        return self._plan(known, self._chosen(program, known, ctx), ctx)

    def _plan(self, known: _Known, options: Sequence[Option], ctx: Context) -> Plan:
        ways = [w for o in options for w in o.ways]
        decisions = tuple(known.decision(w, ctx) for w in ways if w.kind is not Kind.DENSE)
        stay = [Skip(w.place, "stays dense: smaller forms would cost the loss more here than elsewhere") for w in ways if w.kind is Kind.DENSE]
        return Plan(pass_spec=self.to_spec(), decisions=decisions, skips=(*known.skips, *stay))

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Cut widths (which units go does not matter to later plans), and put the planned chains in without data."""
        self._sketch(program, plan, lambda site, chain: chain)

    def _sketch(self, program: Program, plan: Plan, fill: Callable[[WeightSite, Chain], Chain]) -> None:
        widths, chosen = _split(plan)
        networks = self._networks_of(program, widths)
        with Editor(program, self.to_spec()) as editor:
            for network in (n for n in networks if n.new_bias):
                editor.set_bias(network.down.site, torch.zeros(network.down.site.rows), "preview")
        self._cut(program, {n.group: torch.arange(widths[n.name]) for n in networks})
        with Editor(program, self.to_spec()) as editor:
            for site in [s for s in program.sites() if s.name in chosen]:
                planned = chosen[site.name].planned_chain(site)
                if isinstance(planned, str):
                    raise PassError(f"{self.name}: {site.name} cannot become {chosen[site.name].to_spec()}: {planned}; plan again")
                editor.factorize(site, fill(site, planned), "preview")

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Narrow networks and refit what reads them, then factorize in one stage; compare with the plan."""
        known, before = self._know(program, ctx), program.clone()
        widths, chosen = _split(plan)
        _refuse_missing(program, chosen)
        decisions = {d.site: d for d in plan.decisions}
        results = self._narrow(program, {n: widths[n.name] for n in self._networks_of(program, widths)}, known.curves, decisions, ctx)
        if chosen:
            carrier = Carrier(plan=self.to_spec(), chosen=chosen, sensitivity=known.curves.sensitivity, sequential=self.sequential)
            own = replace(plan, decisions=tuple(decisions[n] for n in chosen))
            results += list(run_stage(program, (carrier,), (own,), ctx, ctx.stage).results[0])
        if known.table.items:
            planned = known.table.reached(self._chosen(before, known, ctx))
            ctx.remarks.append(reached_line(before, program, self.unit, self.budget, planned))
            ctx.remarks.append(compared(results))
            ctx.remarks.append(frontier_line(_points(known.table, SHARES), self.unit))
        return tuple(results)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """How many places took which kind."""
        return (kinds_line([r.action for r in results]),)

    def frontier(self, program: Program, ctx: Context, shares: Sequence[float] = SHARES) -> tuple[FrontierPoint, ...]:
        """What each budget of `shares` within reach would buy, and the least in reach, falling; the table is made once."""
        return _points(self._know(program, ctx).table, shares)

    @property
    def space(self) -> Space:
        """What is tried at a site."""
        return Space(
            kinds=frozenset(self.candidates),
            steps=self.steps,
            multiple=self.multiple,
            min_keep=self.min_keep,
            refine=self.refine,
            metric=Metric.BOTH if self.weighting is Weighting.LOSS else Metric.INPUT,
        )

    def _chosen(self, program: Program, known: _Known, ctx: Context) -> list[Option]:
        """What fits the budget; for latency, what fits it as measured in the whole program."""
        try:
            if self.unit is not Unit.LATENCY:
                return known.table.choose(self.budget)
            aim = remembered(ctx, f"factorization-aim-{self.to_spec()}", list(known.scope.tried), program, lambda: self._aim(program, known, ctx))
            return known.table.choose(float(aim["aim"]))
        except PassError as error:
            raise PassError(f"{self.to_spec()}: {error}") from error

    def _aim(self, program: Program, known: _Known, ctx: Context) -> Tensors:
        """The share of the sum of lone times whose choice, run as a whole program on random weights, just fits the budget."""

        def measured(aim: float) -> float:
            sketch = program.clone()
            self._sketch(sketch, self._plan(known, known.table.choose(aim), ctx), lambda site, chain: filled_chain(chain, site.dtype))
            return share_of(program, sketch)

        return {"aim": torch.tensor(met(measured, self.budget, known.table.floor), dtype=torch.float64)}

    def _know(self, program: Program, ctx: Context) -> _Known:
        """Candidates, their errors and amounts; errors and times are remembered between planning and rewriting the same weights."""
        if not ctx.calibration:
            raise CalibrationError(
                f"{self.to_spec()} compares errors on calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs"
            )
        tried, skips, reasons = {}, [], {s.name: self.why_unnamed(s.name) for s in program.sites()}
        for site in program.sites():
            why = reasons[site.name] or why_none(site, self.space)
            tried[site.name] = candidates(site, self.space) if why is None else []
            if not tried[site.name]:
                skips.append(Skip(site.name, why or f"nothing of candidates={[k.value for k in self.candidates]} is smaller than it and keeps min_keep"))
        networks = [n for n in self._networks(program, skips) if all(reasons[s.name] is None for s in n.sites)]
        within = {s.name for n in networks for s in n.sites}
        scope = Scope(program=program, tried={n: c for n, c in tried.items() if c}, networks=networks)
        curves = error_curves(program, scope.tried, networks, self.weighting is Weighting.LOSS, ctx)
        table = build_table(scope, curves, self.unit, ctx)
        return _Known(scope=scope, curves=curves, table=table, skips=tuple(s for s in skips if s.site not in within))

    def _networks(self, program: Program, skips: list[Skip]) -> list[Network]:
        if Kind.SLICE not in self.candidates:
            return []
        limits = Limits(multiple_of=self.multiple, min_keep=self.min_keep)
        networks, left = find_networks(program, limits, self.space.shares())
        skips += left
        return networks

    def _networks_of(self, program: Program, widths: Mapping[str, int]) -> list[Network]:
        found = {n.name: n for n in self._networks(program, [])} if widths else {}
        missing = [name for name in widths if name not in found]
        if missing:
            raise PassError(f"{self.name}: the plan names {missing[0]}, which this program does not have; plan again")
        return [found[name] for name in widths]

    def _narrow(self, program: Program, widths: Mapping[Network, int], curves: Curves, decisions: Mapping[str, Decision], ctx: Context) -> list[SiteResult]:
        kept = {n.group: choose_indices(curves.scores[n.name], k) for n, k in widths.items()}
        if not kept:
            return []
        with Editor(program, self.to_spec()) as editor:
            errors = compensate(editor, kept, Compensation.WEIGHTS, ctx)
        self._cut(program, kept)
        return [_narrowed(decisions[n.name], n, errors[n.down.site.name]) for n in widths]

    def _cut(self, program: Program, kept: Mapping[Group, Tensor]) -> None:
        cut(program, kept, self.to_spec(), "hidden width cut as planned")


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a plan rests on."""

    scope: Scope
    curves: Curves
    table: Table
    skips: tuple[Skip, ...]

    def decision(self, way: Way, ctx: Context) -> Decision:
        """Pure data, enough to carry it out."""
        facts = {"predicted_error": way.error, "predicted_cost": way.cost}
        network = next((n for n in self.scope.networks if n.name == way.place), None)
        if network is not None:
            size = network.group.size
            return Decision(
                site=way.place,
                action=way.action,
                bytes_before=network.nbytes(size),
                bytes_after=way.nbytes,
                facts={**facts, "size": size, "width": round(way.share * size)},
            )
        site = self.scope.sites()[way.place]
        flops = _factorization(way.action).decide(site, ctx).flops
        return Decision(site=way.place, action=way.action, bytes_before=site.nbytes, bytes_after=way.nbytes, flops=flops, facts=facts)


def _split(plan: Plan) -> tuple[dict[str, int], dict[str, Factorization]]:
    """Widths by network, and factorizations by site."""
    widths = {d.site: int(d.facts["width"]) for d in plan.decisions if d.action.startswith(KEEP)}
    return widths, {d.site: _factorization(d.action) for d in plan.decisions if not d.action.startswith(KEEP)}


def _factorization(spec: str) -> Factorization:
    found = parse_pass(spec)
    assert isinstance(found, Factorization)
    return found


def _refuse_missing(program: Program, chosen: Mapping[str, Factorization]) -> None:
    missing = [n for n in chosen if n not in {s.name for s in program.sites()}]
    if missing:
        raise PassError(f"plan_factorization: the plan names {missing[0]}, which this program does not have; plan again")


def _narrowed(decision: Decision, network: Network, error: float) -> SiteResult:
    facts = {**decision.facts, "output_error": error, "kept": decision.facts["width"] / network.group.size}
    return SiteResult(site=decision.site, action=decision.action, bytes_before=decision.bytes_before, bytes_after=decision.bytes_after, facts=facts)


def _points(table: Table, shares: Sequence[float]) -> tuple[FrontierPoint, ...]:
    if not table.items:
        return ()
    return tuple(table.point(s) for s in [*(s for s in sorted(shares, reverse=True) if s >= table.floor), table.floor])
