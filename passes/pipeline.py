"""Run passes in order over one program: legality first, one calibration walk for neighbours, verify, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from ..ir.errors import PassError
from ..ir.program import Program, Stage
from .base import Guarantee, Need, Pass, PassReport, Plan, SitePass, SiteResult
from .context import Context
from .devices import working_on
from .stage import run_stage


@dataclass(frozen=True)
class Outcome:
    """The compressed program, one report per pass, and the weakest guarantee among them."""

    program: Program
    reports: tuple[PassReport, ...]

    @property
    def guarantee(self) -> Guarantee:
        """The pipeline's own guarantee, computed from its parts."""
        order = list(Guarantee)
        return max((r.guarantee for r in self.reports), key=order.index, default=Guarantee.EXACT)


@dataclass(frozen=True)
class PlannedPass:
    """A pass with its plan and the program's bytes before and after it, if carried out."""

    one: Pass = field(repr=False)
    plan: Plan
    bytes_before: int
    bytes_after: int


def plan_passes(program: Program, passes: Sequence[Pass], ctx: Context) -> tuple[PlannedPass, ...]:
    """Plan every pass on the program as the earlier ones will leave it, without touching a weight.

    Raises `PassError` when a pass would touch nothing and does not say `allow_empty`.
    """
    ghost = program.clone()
    with working_on(program):
        return tuple(_planned(ghost, one, ctx) for one in passes)


def _planned(ghost: Program, one: Pass, ctx: Context) -> PlannedPass:
    before = ghost.nbytes
    plan = one.analyze(ghost, ctx)
    _refuse_empty(one, plan)
    one.preview(ghost, plan, ctx)
    return PlannedPass(one, plan, before, ghost.nbytes)


def _refuse_empty(one: Pass, plan: Plan) -> None:
    if plan.decisions or one.allow_empty:
        return
    reasons: dict[str, list[str]] = {}
    for skip in plan.skips:
        reasons.setdefault(skip.why, []).append(skip.site)
    listed = "; ".join(f"{len(sites)} sites ({sites[0]}{', ...' if len(sites) > 1 else ''}): {why}" for why, sites in list(reasons.items())[:5])
    raise PassError(f"{one.to_spec()} would touch nothing: {listed or 'the graph has nothing it applies to'}. Change its options, or set allow_empty=true")


def run_pipeline(program: Program, passes: Sequence[Pass], ctx: Context) -> Outcome:
    """Plan everything first, then carry it out on a clone; the given program is never changed."""
    plan_passes(program, passes, ctx)
    ctx = ctx if ctx.original is not None else replace(ctx, original=program)
    current = program.clone()
    reports: list[PassReport] = []
    with working_on(program):
        for number, stage in enumerate(_stages(passes)):
            reports += _run(current, stage, replace(ctx, stage=number, remarks=[], history=[]))
            current.verify()
    if current.stage is Stage.CAPTURED and passes:
        current.stage = Stage.COMPRESSED
    return Outcome(current, tuple(reports))


def _stages(passes: Sequence[Pass]) -> list[tuple[Pass, ...]]:
    """Neighbouring site passes that watch the same activations share a stage; every other pass is one of its own, and those that make new sites."""

    def key(item: tuple[int, Pass]) -> tuple[str, object]:
        index, one = item
        if isinstance(one, SitePass) and one.needs is not Need.NONE and not one.makes_sites:
            return ("walk", (one.sees_edits, one.guidance))
        return ("alone", index)

    return [tuple(one for _, one in group) for _, group in groupby(enumerate(passes), key)]


def _run(program: Program, stage: tuple[Pass, ...], ctx: Context) -> list[PassReport]:
    planned = plan_passes(program, stage, ctx)
    sites = tuple(p for p in stage if isinstance(p, SitePass))
    if len(sites) == len(stage):
        done = run_stage(program, sites, [p.plan for p in planned], ctx, ctx.stage)
        results, seconds = done.results, done.seconds
    else:
        began = time.perf_counter()
        results = (stage[0].rewrite(program, planned[0].plan, ctx),)
        seconds = (time.perf_counter() - began,)
    reports = [_report(program, p, r, s) for p, r, s in zip(planned, results, seconds, strict=True)]
    return [replace(reports[0], notes=(*reports[0].notes, *ctx.remarks), history=tuple(ctx.history)), *reports[1:]]


def _report(program: Program, planned: PlannedPass, results: tuple[SiteResult, ...], seconds: float) -> PassReport:
    return PassReport(
        pass_spec=planned.one.to_spec(),
        guarantee=planned.one.guarantee,
        taken=results,
        skipped=planned.plan.skips,
        bytes_before=planned.bytes_before,
        bytes_after=planned.bytes_after,
        seconds=seconds,
        notes=planned.one.notes(program, results),
    )
