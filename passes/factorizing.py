"""What the passes that factorize single weights share: legality, the size rule, the edit and its measured facts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.chain import Chain, parameters
from ..ir.edit import Editor
from ..ir.program import Program
from ..ir.site_calls import why_not_compressible
from ..ir.sites import SiteKind, WeightSite
from .base import Decision, Guarantee, Plan, SitePass, SiteResult
from .calibrate import Statistics
from .context import Context

MATRICES = (SiteKind.LINEAR, SiteKind.ADDMM, SiteKind.MM)


@dataclass(frozen=True, kw_only=True)
class Factorization(SitePass):
    """Replaces a weight by a chain of smaller ones, which are sites for every later pass. A tied weight is left alone: the other site would keep it anyway."""

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    makes_sites: ClassVar[bool] = True

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Linears."""
        return frozenset(MATRICES)

    @abstractmethod
    def planned_chain(self, site: WeightSite) -> Chain | str:
        """The chain as planned, its weights without data, or the reason why there is none that is smaller than the weight."""

    @abstractmethod
    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """Factors of `matrix: [N, K] float32`, and facts worth reporting; a reason when the data says that none are worth having.

        `seed` is the run's, for filters that are drawn.
        """

    def why_not(self, site: WeightSite) -> str | None:
        """Compressed or tied weights, and weights that no chain makes smaller."""
        if (reason := why_not_compressible(site)) is not None:
            return reason
        if site.tied:
            return f"its weight is tied to {', '.join(site.tied)}, which would keep it: factors would only add to it"
        planned = self.planned_chain(site)
        return planned if isinstance(planned, str) else None

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """The planned number of weights."""
        planned = self.planned_chain(site)
        assert not isinstance(planned, str)
        count = parameters(planned)
        after = count * site.dtype.itemsize
        action = f"{count:,} of {site.parameters:,} weights"
        return Decision(site=site.name, action=action, bytes_before=site.nbytes, bytes_after=after, flops=20.0 * min(site.rows, site.columns) * site.parameters)

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Factorize, and report how many weights are left."""
        chain, facts = self.chain(site, site.matrix().float(), statistics, ctx.seed)
        if isinstance(chain, str):
            return SiteResult(site=site.name, action=f"left as it is: {chain}", bytes_before=site.nbytes, bytes_after=site.nbytes, facts={"kept": 1.0} | facts)
        count = parameters(chain)
        known = {"kept": count / site.parameters} | facts
        editor.factorize(site, chain, f"{self.name}: {count:,} of {site.parameters:,} weights", known)
        after = count * site.dtype.itemsize
        return SiteResult(site=site.name, action=f"{count:,} of {site.parameters:,} weights", bytes_before=site.nbytes, bytes_after=after, facts=known)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Put the planned chains in, without data."""
        chosen = {d.site for d in plan.decisions}
        with Editor(program, self.to_spec()) as editor:
            for site in [s for s in program.sites() if s.name in chosen]:
                planned = self.planned_chain(site)
                assert not isinstance(planned, str)
                editor.factorize(site, planned, "preview")


def empty(*shape: int) -> Tensor:
    """A weight without data."""
    return torch.empty(shape, device="meta")
