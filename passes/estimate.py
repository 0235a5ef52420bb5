"""The dry run: plan, legality, expected bytes, time and memory, before any weight is touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.sites import SiteKind
from .base import Need, Pass, Plan, SitePass
from .calibrate import site_groups
from .context import Call, Context
from .devices import waiting_for, working_on
from .pipeline import plan_passes


@dataclass(frozen=True, kw_only=True)
class PassEstimate:
    """One pass of a dry run. Seconds and peak bytes are estimates; bytes before and after are exact (tied weights that will share their codes count twice)."""

    plan: Plan
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would do and cost."""

    passes: tuple[PassEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for p in self.passes:
            lines.append(f"{p.plan.pass_spec}: {len(p.plan.decisions)} sites taken, {len(p.plan.skips)} skipped")
            lines.append(f"  bytes {p.bytes_before:,} -> {p.bytes_after:,}; about {p.seconds:.0f} s and {p.peak_bytes / 2**20:,.0f} MiB at peak (estimates)")
            if len({d.action for d in p.plan.decisions}) > 1:
                lines += [f"  {d.site}: {d.action}" for d in p.plan.decisions]
            lines += [f"  {why}: {count} sites, first {first}" for why, (count, first) in _reasons(p.plan).items()]
        return "\n".join(lines)


def _reasons(plan: Plan) -> dict[str, tuple[int, str]]:
    """Skip reason -> (number of sites, first site)."""
    reasons: dict[str, tuple[int, str]] = {}
    for skip in plan.skips:
        count, first = reasons.get(skip.why, (0, skip.site))
        reasons[skip.why] = (count + 1, first)
    return reasons


def dry_run(program: Program, passes: Sequence[Pass], ctx: Context) -> DryRun:
    """Plan all passes and estimate their cost on this machine."""
    with working_on(program):
        rate = matmul_rate(waiting_for(program))
    estimates = []
    for planned in plan_passes(program, passes, ctx):
        needs = planned.one.needs if isinstance(planned.one, SitePass) else Need.NONE
        flops = sum(d.flops for d in planned.plan.decisions)
        memory = float(planned.bytes_before + planned.bytes_after)
        if needs & Need.FISHER:
            memory += 4 * _planned_parameters(program, planned.plan)
        if needs is not Need.NONE:
            flops += _walk_flops(program, planned.plan, ctx, needs)
            memory += live_bytes(program, ctx)
        if needs & ~Need.INPUTS:
            memory += 4 * max((s.columns**2 for s in program.sites() if s.kind is not SiteKind.EMBEDDING), default=0)
        estimates.append(
            PassEstimate(plan=planned.plan, bytes_before=planned.bytes_before, bytes_after=planned.bytes_after, seconds=flops / rate, peak_bytes=int(memory))
        )
    return DryRun(passes=tuple(estimates))


def matmul_rate(synchronize: Callable[[], Any] | None = None) -> float:
    """Floating-point operations a second of one 512-wide matmul here, the unit of the time estimates."""
    wait = synchronize or (lambda: None)
    a = torch.randn(512, 512)
    a @ a
    wait()
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    wait()
    return 4 * 2 * 512**3 / (time.perf_counter() - began)


def calibration_rows(program: Program, ctx: Context) -> float:
    """Tokens (or samples) of the calibration set."""
    return _elements(ctx) * _rows_per_element(program)


def most_rows(program: Program, calls: Iterable[Call]) -> float:
    """Tokens (or samples) of the largest call."""
    return max(_call_elements(call) for call in calls) * _rows_per_element(program)


def _rows_per_element(program: Program) -> float:
    """Elements of the largest example input set the unit."""
    return _example_rows(program) / max(1, _largest(program.inputs.leaves))


def _elements(ctx: Context) -> int:
    return sum(_call_elements(c) for c in ctx.calibration)


def _call_elements(call: Call) -> int:
    return _largest(torch.utils._pytree.tree_leaves([list(call[0]), dict(call[1])]))


def _largest(leaves: Sequence[Any]) -> int:
    return max((x.numel() for x in leaves if isinstance(x, Tensor)), default=0)


def _example_rows(program: Program) -> float:
    """Rows the first linear-like site sees on the example inputs."""
    for site in program.sites():
        if site.kind is not SiteKind.EMBEDDING:
            return max(1.0, value_size(site.data) / site.columns)
    return 1.0


def _walk_flops(program: Program, plan: Plan, ctx: Context, needs: Need) -> float:
    rows = calibration_rows(program, ctx)
    forward = sum(2.0 * s.parameters for s in program.sites() if s.kind is not SiteKind.EMBEDDING) * rows
    chosen = {d.site for d in plan.decisions}
    grams = sum(2.0 * g[0].columns ** 2 for g in site_groups([s for s in program.sites() if s.name in chosen])) * rows
    sweeps = bool(needs & Need.GUIDED) + bool(needs & Need.FISHER)  # a sweep of gradients runs forwards twice and backwards once
    return (1.5 + 4 * sweeps) * forward + (grams if needs & (Need.GRAM | Need.GUIDED) else 0.0)


def _planned_parameters(program: Program, plan: Plan) -> int:
    chosen = {d.site for d in plan.decisions}
    return sum(s.parameters for s in program.sites() if s.name in chosen)


def live_bytes(program: Program, ctx: Context) -> float:
    """Most bytes of values held at once by a calibration walk, scaled from the example inputs."""
    last = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    live = peak = 0.0
    for node in program.graph.nodes:
        live += 4.0 * node_size(node)
        peak = max(peak, live)
        live -= sum(4.0 * node_size(s) for s in node.all_input_nodes if last[s] is node)
    return peak * _elements(ctx) / max(1, _largest(program.inputs.leaves))


def node_size(node: fx.Node) -> float:
    """Elements of a node's value on the example inputs; weights and non-tensors count nothing."""
    return value_size(node) if node.op == "call_function" else 0.0


def value_size(node: fx.Node) -> float:
    """Elements of any node's value on the example inputs, inputs and weights among them; non-tensors count nothing."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0.0
    size = 1.0
    for s in value.shape:
        size *= s if isinstance(s, int) else float(s.node.hint)
    return size
