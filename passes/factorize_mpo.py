"""Matrix product operators of two sites (CompactifAI): a weight becomes a sum of Kronecker products, of the member of a family that suits it.

Source: CompactifAI (arXiv 2401.14109), which decomposes weights alone into balanced sites. Data-weighted refinement, the family from low-rank pairs (t = 1) to
balanced sites at equal numbers of weights, and the choice among its members by output error are ours (`kronecker_fit`, `kronecker_race`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..ir.chain import Chain
from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.formats.tensor_train import TensorTrain
from ..ir.program import Program
from ..ir.site_calls import why_not_compressible
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Need, Plan, SitePass, SiteResult
from .budgeted import Budgeted
from .calibrate import Statistics
from .context import Context
from .contraction_order import Order, faster_first
from .estimate import node_size
from .factorize_svd import Metric
from .kronecker_fit import rearranged, whitened_energy
from .kronecker_race import Winner, best_member, shared_whitening, smallest_bond
from .kronecker_sum import Cores, Modes, as_chain, family
from .modes import balanced_modes
from .spectra import spectrum
from .stored_trains import store, stored_train

FAMILY = (1, 2, 4, 8)
BALANCED = 0


@dataclass(frozen=True, kw_only=True)
class FactorizeMpo(Budgeted):
    """`weight: [N, K]` becomes cores `[a, b, chi]` and `[chi, c, d]` with N = ac, K = bd (padded with zeros).

    Give one of `ratio` (kept share), `chi`, `tolerance` (relative output error; the smallest chi that meets it) or `budget` (kept share of all chosen weights
    together; see `rank_budget`).

    `family` fixes b = c (1: a low-rank pair; 0: modes as equal as the sizes allow, as published); left out, 1, 2, 4 and 8 are tried and the least output
    error wins at equal numbers of weights. `refine`: rounds of least squares under the Gram, at most; `metric=weight` needs no data and does not refine, as
    published. `sites` above 2 are a form of storage (`tensor_train`), rebuilt when the weight is used. `order`: which core comes first.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    chi: int | None = option(None, ge=1)
    tolerance: float | None = option(None, gt=0.0, lt=1.0)
    family: int | None = option(None, ge=0)
    metric: Metric = Metric.INPUT
    refine: int = option(10, ge=0)
    sites: int = option(2, ge=2)
    order: Order = Order.ARITHMETIC
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(v is not None for v in (self.ratio, self.chi, self.tolerance, self.budget)) != 1:
            raise SpecError("factorize_mpo: give exactly one of ratio, chi, tolerance and budget, for example factorize_mpo{ratio=0.7}")
        if self.metric is Metric.BOTH:
            raise SpecError("factorize_mpo: metric=both is not built for cores; use input, or factorize_svd{metric=both}")
        if self.sites > 2 and (self.metric is not Metric.WEIGHT or self.family is not None or self.budget is not None):
            raise SpecError(
                f"factorize_mpo: sites={self.sites} stores balanced cores of the weight alone, of a ratio, chi or tolerance at each site, "
                "for example factorize_mpo{ratio=0.5,sites=3,metric=weight}"
            )
        self.refuse_unweighable(self.metric is Metric.WEIGHT)

    @property
    def needs(self) -> Need:
        """The input Gram, unless only the weight counts."""
        return Need.NONE if self.metric is Metric.WEIGHT else Need.GRAM

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def at_rank(self, rank: int) -> Self:
        """Cores of one bond."""
        return replace(self, budget=None, chi=rank)

    def unit(self, site: WeightSite) -> int:
        """Numbers in both cores for one value of the bond."""
        return self._tried(site)[0].parameters(1)

    @property
    def least(self) -> int:
        """Any bond will do."""
        return 1

    @property
    def spectral(self) -> str:
        """Metric and member."""
        return f"{self.metric.value}-{self.family}"

    def gains(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, sensitivity: Tensor | None) -> Tensor:
        """Of low-rank pairs and of weights alone the spectrum; of other members that under the nearest Kronecker product, as refined ones have none."""
        modes = self._tried(site)[0]
        if statistics is None or statistics.gram is None:
            return spectrum(rearranged(matrix, modes)).energy
        gram = statistics.gram[0]
        if modes.b == modes.c == 1:
            return spectrum(matrix, gram).weighted_energy(sensitivity)
        power = ((matrix @ gram) * matrix).sum(1).double().clamp_min(0.0)
        energy = whitened_energy(matrix, modes, shared_whitening(gram, modes, statistics.shared))
        weights = sensitivity.double() if sensitivity is not None else torch.ones(len(power), dtype=torch.float64)
        return energy * (float((power * weights).sum()) / max(float(energy.sum()), 1e-300))

    def planned_format(self, site: WeightSite) -> TensorTrain | None:
        """The form of storage of three and more sites."""
        stored = stored_train(site, self.sites, chi=self.chi, ratio=self.ratio) if self.sites > 2 else None
        return stored if isinstance(stored, TensorTrain) else None

    def why_not(self, site: WeightSite) -> str | None:
        """As for all factorizations, and cores that are no smaller than the weight."""
        if self.sites == 2:
            return super().why_not(site)
        stored = why_not_compressible(site) or stored_train(site, self.sites, chi=self.chi, ratio=self.ratio)
        return stored if isinstance(stored, str) else None

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """A chain of two products, or stored cores."""
        planned = self.planned_format(site)
        return super().rewrite_site(editor, site, decision, statistics, ctx) if planned is None else store(editor, site, planned, self.tolerance)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Chains or formats without data."""
        if self.sites == 2:
            super().preview(program, plan, ctx)
        else:
            SitePass.preview(self, program, plan, ctx)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """Cores of the first member that is tried; all hold about as many weights. With a tolerance, the most that are smaller than the weight."""
        found = self._members(site)
        if isinstance(found, str):
            return found
        modes, chi = found[0]
        first, second = torch.empty(modes.a, modes.b, chi, device="meta"), torch.empty(chi, modes.c, modes.d, device="meta")
        return as_chain(Cores(first=first, second=second, rows=site.rows, columns=site.columns))

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """Adds the refinement to the plan of every factorization."""
        if (fmt := self.planned_format(site)) is not None:
            after = fmt.nbytes(site.rows, site.columns, site.dtype)
            return Decision(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, flops=20.0 * site.rows * site.parameters)
        plan = super().decide(site, ctx)
        rounds = 0 if self.metric is Metric.WEIGHT else self.refine / 2 * (2 if self.family is None else 1) * (4 if self.tolerance is not None else 1)
        return replace(plan, flops=plan.flops + 10.0 * rounds * site.parameters * site.columns)

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """The winner's operators, its t, bond, error, and multiply-adds a token over the dense weight's."""
        winner, errors = self.winner(site, matrix, statistics)
        if isinstance(winner, str):
            return winner, {}
        metric = "weight_error" if self.metric is Metric.WEIGHT else "output_error"
        facts = {"t": float(winner.modes.b), "chi": float(winner.chi), metric: winner.error}
        facts["multiplications"] = min(winner.modes.multiplications(winner.chi)) / site.parameters
        return as_chain(winner.cores, self._second_first(site, winner)), facts | errors

    def winner(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None) -> tuple[Winner | str, dict[str, float]]:
        """The member with the least error (with a tolerance: the fewest weights), or why there is none, and the errors of all that were tried."""
        members = self._members(site)
        assert not isinstance(members, str)
        gram = None if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None else statistics.gram[0]
        shared: dict[str, Any] = statistics.shared if statistics is not None else {}
        if self.tolerance is not None:
            members = self._within(matrix, members, gram, shared)
            if not members:
                return f"no bond that makes it smaller meets tolerance={self.tolerance}", {}
        winner = best_member(matrix, members, gram, self.refine, shared)
        return winner, {f"error_t{t}": error for t, error in winner.errors.items()} if len(members) > 1 else {}

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Says so where operators do more arithmetic than the weights they replace."""
        slower = [times for r in results if (times := r.facts.get("multiplications", 0.0)) > 1.0]
        if not slower:
            return super().notes(program, results)
        why = f"{len(slower)} of {len(results)} operators do more multiply-adds than the weights they replace, the worst {max(slower):.3g} times as many"
        return (*super().notes(program, results), f"{why}: fewer bytes, but a slower model; factorize_svd, or family=1, is smaller and faster")

    def _within(self, matrix: Tensor, members: list[tuple[Modes, int]], gram: Tensor | None, shared: dict[str, Any]) -> list[tuple[Modes, int]]:
        """The member that meets the tolerance with the fewest weights, if any; later members must do with fewer than earlier ones."""
        best: tuple[Modes, int] | None = None
        assert self.tolerance is not None
        for modes, most in members:
            limit = most if best is None else min(most, (best[0].parameters(best[1]) - 1) // modes.parameters(1))
            chi = smallest_bond(matrix, modes, limit, gram, self.refine, self.tolerance, shared)
            best = best if chi is None else (modes, chi)
        return [] if best is None else [best]

    def _second_first(self, site: WeightSite, winner: Winner) -> bool | None:
        if self.order is Order.ARITHMETIC:
            return None
        tokens = max(1, int(node_size(site.data)) // site.columns) if site.data.op == "call_function" else 1
        return faster_first(winner.cores, tokens, site.dtype)

    def _members(self, site: WeightSite) -> list[tuple[Modes, int]] | str:
        """Modes to try with their bonds (with a tolerance: the largest that are smaller than the weight), or why none is smaller than the weight."""
        tried, share = self._tried(site), 1.0 if self.tolerance is not None else self.ratio or 1.0
        found = [(m, self.chi or min(int(share * site.parameters / m.parameters(1)), m.full if self.tolerance is not None else site.parameters)) for m in tried]
        if self.chi is not None and self.chi > max(m.full for m in tried):
            return f"chi={self.chi} is more than the exact bond {max(m.full for m in tried)}; use a smaller one"
        fitting = [(modes, chi) for modes, chi in found if 1 <= chi <= modes.full and modes.parameters(chi) <= site.parameters]
        if not fitting:
            modes, chi = found[0]
            return f"cores of bond {max(chi, 1)} hold {modes.parameters(max(chi, 1)):,} weights, the weight itself {site.parameters:,}"
        return fitting

    def _tried(self, site: WeightSite) -> list[Modes]:
        return [self._modes(site, t) for t in (FAMILY if self.family is None else (self.family,))]

    def _modes(self, site: WeightSite, t: int) -> Modes:
        if t != BALANCED:
            return family(site.rows, site.columns, t)
        (a, c), (b, d) = balanced_modes(site.rows, 2), balanced_modes(site.columns, 2)
        return Modes(a=a, b=b, c=c, d=d)
