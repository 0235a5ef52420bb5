"""Magnitude pruning: remove the weights of smallest absolute value, per matrix, per row, or over the whole model.

Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015 (arXiv 1506.02626).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from ..ir.program import Program
from ..ir.sites import WeightSite
from .base import Decision, Plan
from .calibrate import Statistics
from .context import Context
from .masks import below, kth_smallest, lowest_of_all, lowest_of_pattern, lowest_per_row, parse_pattern
from .pruning import MaskPruning


class MagnitudeScope(Enum):
    """Over what the fraction is counted."""

    LAYER = "layer"
    ROW = "row"
    GLOBAL = "global"


@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(MaskPruning):
    """`weight: [N, K]`: remove the lowest |weight|. With `scope=global` one threshold serves all sites the pass takes."""

    scope: MagnitudeScope = MagnitudeScope.LAYER

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """For the global scope, find the exact threshold and share ties out in graph order."""
        plan = super().analyze(program, ctx)
        if self.scope is not MagnitudeScope.GLOBAL or self.pattern or not plan.decisions:
            return plan
        sites = {s.name: s for s in program.sites()}
        chosen = [sites[d.site] for d in plan.decisions]
        count = round(self.fraction * sum(s.parameters for s in chosen))
        threshold, ties = kth_smallest(lambda: (s.matrix().abs() for s in chosen), count)
        decisions = []
        for decision, site in zip(plan.decisions, chosen, strict=True):
            here = min(ties, int((site.matrix().abs() == threshold).sum())) if count else 0
            decisions.append(replace(decision, facts={"threshold": threshold, "ties": here}))
            ties -= here
        return replace(plan, decisions=tuple(decisions))

    def mask(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> Tensor:
        """`[N, K] bool`, True where removed."""
        score = matrix.abs()
        if self.pattern:
            return lowest_of_pattern(score, *parse_pattern(self.pattern))
        if self.scope is MagnitudeScope.GLOBAL:
            return below(score, decision.facts["threshold"], int(decision.facts["ties"]))
        if self.scope is MagnitudeScope.ROW:
            return lowest_per_row(score, round(self.fraction * site.columns))
        return lowest_of_all(score, round(self.fraction * site.parameters))
