"""Run site passes over one program: group by group, under one calibration walk, with a checkpoint after every group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from torch import Tensor, fx

from ..ir.chain import Chain, to_json, weighted
from ..ir.edit import Editor
from ..ir.formats.base import WeightFormat
from ..ir.program import Program
from ..ir.sites import WeightSite, find_sites
from .base import Decision, Need, Plan, SitePass, SiteResult
from .calibrate import CalibrationWalk, Statistics, site_groups
from .checkpoint import EditRecord, GroupRecord
from .context import Context
from .sensitivities import Sensitivities
from .threads import one_thread


class _RecordingEditor(Editor):
    """An editor that also keeps its site edits, for the checkpoint."""

    def __init__(self, program: Program, pass_spec: str) -> None:
        super().__init__(program, pass_spec)
        self.edits: list[EditRecord] = []

    def set_matrix(self, site: WeightSite, matrix: Tensor, why: str, facts: Mapping[str, float] | None = None) -> None:
        super().set_matrix(site, matrix, why, facts)
        self.edits.append(EditRecord(site.name, "", why, dict(facts or {}), {"matrix": matrix}))

    def compress(self, site: WeightSite, fmt: WeightFormat, payload: Mapping[str, Tensor], why: str, facts: Mapping[str, float] | None = None) -> fx.Node:
        node = super().compress(site, fmt, payload, why, facts)
        self.edits.append(EditRecord(site.name, fmt.to_spec(), why, dict(facts or {}), dict(payload)))
        return node

    def factorize(self, site: WeightSite, chain: Chain, why: str, facts: Mapping[str, float] | None = None) -> None:
        super().factorize(site, chain, why, facts)
        tensors = {link.name: link.weight for link in weighted(chain)}
        self.edits.append(EditRecord(site.name, "", why, dict(facts or {}), tensors, to_json(chain)))


@dataclass(frozen=True)
class StageResult:
    """Per pass of the stage: what was done, and the seconds it took (the walk counts for the first pass)."""

    results: tuple[tuple[SiteResult, ...], ...]
    seconds: tuple[float, ...]


def run_stage(program: Program, passes: Sequence[SitePass], plans: Sequence[Plan], ctx: Context, stage: int = 0) -> StageResult:
    """Carry out the plans of site passes that share one walk.

    Sites that see the same input form a group. For each group every pass is applied in turn, so a later pass sees the weights the earlier one left,
    and both use the same statistics.
    """
    return _Stage(program, passes, plans, ctx, stage).run()


class _Stage:
    def __init__(self, program: Program, passes: Sequence[SitePass], plans: Sequence[Plan], ctx: Context, stage: int) -> None:
        self.program, self.passes, self.ctx, self.stage = program, passes, ctx, stage
        self.decisions: list[dict[str, Decision]] = [{d.site: d for d in plan.decisions} for plan in plans]
        self.needs = reduce(or_, (p.needs for p in passes), Need.NONE)
        self.results: list[list[SiteResult]] = [[] for _ in passes]
        self.seconds = [0.0 for _ in passes]
        self.editors = [_RecordingEditor(program, p.to_spec()) for p in passes]
        self.sequential = all(p.sees_edits for p in passes)
        self.observed = program if self.sequential else program.clone()
        self.walk = CalibrationWalk(self.observed, ctx.calibration) if self.needs else None
        decided = [s for s in program.sites() if any(s.name in d for d in self.decisions)]
        self.sensitivities = Sensitivities(program, decided, self.needs, passes[0].guidance, ctx)

    def run(self) -> StageResult:
        began = time.perf_counter()
        groups = [[s.name for s in g] for g in site_groups([s for s in self.observed.sites() if any(s.name in d for d in self.decisions)])]
        label = " + ".join(p.name for p in self.passes)
        for index, names in enumerate(self.ctx.track(groups, label)):
            if not self._replay(index, names):
                self._treat(index, names)
        self.editors[-1].finish()
        self.seconds[0] += time.perf_counter() - began - sum(self.seconds)
        return StageResult(tuple(tuple(r) for r in self.results), tuple(self.seconds))

    def _treat(self, index: int, names: list[str]) -> None:
        statistics = self._observe(names)
        done: list[list[SiteResult]] = []
        for number, (one, editor) in enumerate(zip(self.passes, self.editors, strict=True)):
            editor.edits.clear()
            sites = [s for s in _sites(self.program, names) if s.name in self.decisions[number]]
            done.append([self._apply(one, editor, s, number, statistics) for s in sites])
        if self.ctx.checkpoint is not None:
            edits = [list(e.edits) for e in self.editors]
            self.ctx.checkpoint.save(self.stage, index, GroupRecord(names, edits, done))
        self._keep(done)

    def _apply(self, one: SitePass, editor: Editor, site: WeightSite, number: int, statistics: Statistics | None) -> SiteResult:
        previous, began = site.node.prev, time.perf_counter()
        with one_thread():
            result = one.rewrite_site(editor, site, self.decisions[number][site.name], statistics, self.ctx)
        self._resume_walk(previous)
        self.seconds[number] += time.perf_counter() - began
        return result

    def _resume_walk(self, previous: fx.Node) -> None:
        """An edit may have replaced the node the walk stands before; go on after the last node that is still there."""
        if self.walk is not None and self.sequential:
            self.walk.realign(previous)

    def _observe(self, names: list[str]) -> Statistics | None:
        if self.walk is None:
            return None
        sites = _sites(self.observed, names)
        statistics = self.walk.statistics(sites, self.needs)
        self.sensitivities.complete(statistics, self.walk, sites)
        return statistics

    def _replay(self, index: int, names: list[str]) -> bool:
        """Redo a finished group from the checkpoint; the walk only runs forward through it."""
        saved = self.ctx.checkpoint.load(self.stage, index, names) if self.ctx.checkpoint is not None else None
        if saved is None:
            return False
        if self.walk is not None:
            self.walk.run_before(_sites(self.observed, names)[0].node)
        for editor, edits in zip(self.editors, saved.edits, strict=True):
            for edit in edits:
                site = _sites(self.program, [edit.site])[0]
                previous = site.node.prev
                edit.apply(editor, site)
                self._resume_walk(previous)
        self._keep(saved.results)
        return True

    def _keep(self, done: Sequence[Sequence[SiteResult]]) -> None:
        for results, new in zip(self.results, done, strict=True):
            results.extend(new)


def _sites(program: Program, names: list[str]) -> list[WeightSite]:
    found = {s.name: s for s in find_sites(program) if s.name in names}
    return [found[n] for n in names]
