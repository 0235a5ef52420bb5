"""Sentences of a planner's report: what the budget bought, how predictions held, and what other budgets would buy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...ir.axes import analyze_axes
from ...ir.program import Program
from ..base import SiteResult
from .choices import FrontierPoint, Unit

ROUNDS = 15


def reached_line(before: Program, after: Program, unit: Unit, budget: float, planned: float) -> str:
    """The amount before and after, as counted or measured on the whole programs."""
    if unit is Unit.LATENCY:
        from ...runtime.latency import latency

        timed = latency({"before": before.run_examples, "after": after.run_examples}, rounds=ROUNDS)["after"]
        found, share = f"{1e3 * timed.seconds.median:.3f} ms a run on the example inputs", timed.ratio.median
    else:
        old, new = (before.nbytes, after.nbytes) if unit is Unit.BYTES else (analyze_axes(before).macs(), analyze_axes(after).macs())
        found, share = f"{unit.value} {old:,} -> {new:,}", new / old
    missed = "" if share <= budget + 1e-9 else "; over the budget: operators alone take less than in the program, plan with a smaller one"
    return f"{found}: {share:.1%} measured, {planned:.1%} planned, {budget:.1%} allowed{missed}"


def compared(results: Sequence[SiteResult]) -> str:
    """Mean relative output errors as planned on the program as it was, and as measured behind what had been changed."""
    both = [(r.facts["predicted_error"], r.facts["output_error"]) for r in results if "output_error" in r.facts]
    planned, measured = (sum(v) / max(1, len(both)) for v in zip(*both, strict=True)) if both else (0.0, 0.0)
    return f"relative output errors over {len(both)} places: {planned:.4f} predicted, {measured:.4f} measured when carried out"


def kinds_line(actions: Sequence[str]) -> str:
    """How many places took which kind."""
    counts = Counter(a.partition("{")[0] if "{" in a else "narrower networks" for a in actions)
    return ", ".join(f"{n} x {kind}" for kind, n in sorted(counts.items())) or "everything stays dense"


def frontier_line(points: Sequence[FrontierPoint], unit: Unit) -> str:
    """Budget and predicted cost, from the largest budget to the least in reach."""
    return f"predicted cost by share of {unit.value}: " + ", ".join(f"{p.budget:.1%}: {p.cost:.3g}" for p in points) + " (the least in reach)"
