"""Carries a plan out: every site gets the factorization that was chosen for it, in one stage, under one calibration walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import ClassVar

from torch import Tensor

from ...ir.edit import Editor
from ...ir.sites import WeightSite
from ..base import Decision, Guarantee, Need, SitePass, SiteResult
from ..calibrate import Statistics
from ..context import Context
from ..factorizing import Factorization
from .curves import seen_by


@dataclass(frozen=True, kw_only=True)
class Carrier(SitePass):
    """An internal pass: `chosen` factorizations by site, the `plan`'s spec for the journal, and the `sensitivity: [N]` of outputs by site.

    Sensitivities stand where a pass with `metric=both` looks for the Fisher information of its outputs, so that what is minimised is what was planned with.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    plan: str
    chosen: Mapping[str, Factorization] = field(default_factory=dict)
    sensitivity: Mapping[str, Tensor] = field(default_factory=dict)
    sequential: bool = True

    def __post_init__(self) -> None:
        """Nothing to check: its fields are not options."""

    def to_spec(self) -> str:
        """The planner's."""
        return self.plan

    @property
    def needs(self) -> Need:
        """What the chosen passes ask for; sensitivities stand for Fisher information."""
        return reduce(or_, (one.needs for one in self.chosen.values()), Need.NONE) & ~Need.FISHER

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """Sites without a choice."""
        return None if site.name in self.chosen else "nothing was chosen for it"

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """The chosen pass's own decision."""
        return self.chosen[site.name].decide(site, ctx)

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """The chosen pass does it; the plan's facts stay beside the measured ones."""
        if statistics is not None and site.name in self.sensitivity:
            statistics.fisher[site.name] = self.sensitivity[site.name].unsqueeze(1)
        one = self.chosen[site.name]
        done = one.rewrite_site(editor, site, decision, seen_by(one, site, statistics) if statistics is not None else None, ctx)
        return replace(done, action=decision.action, facts={**done.facts, **decision.facts})
