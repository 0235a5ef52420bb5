"""Matrix product operators of two sites (CompactifAI): a weight becomes a sum of Kronecker products, of the member of a family that suits it.

Source: CompactifAI (arXiv 2401.14109), which decomposes weights alone into balanced sites. Data-weighted refinement, the family from low-rank pairs (t = 1) to
balanced sites at equal numbers of weights, and the choice among its members by output error are ours (`kronecker_sum`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.chain import Chain
from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.formats.tensor_train import TensorTrain
from ..ir.program import Program
from ..ir.site_calls import why_not_compressible
from ..ir.sites import WeightSite
from ..ir.spec import option
from ..ir.trains import full_bonds, train_parameters
from .base import Decision, Need, Plan, SitePass, SiteResult
from .calibrate import Statistics
from .context import Context
from .factorize_svd import Metric
from .factorizing import Factorization
from .kronecker_sum import Cores, Modes, as_chain, family, fit
from .modes import balanced_modes

FAMILY = (1, 2, 4, 8)
BALANCED = 0


@dataclass(frozen=True, kw_only=True)
class FactorizeMpo(Factorization):
    """`weight: [N, K]` becomes cores `[a, b, chi]` and `[chi, c, d]` with N = ac, K = bd (padded with zeros). Give `ratio` (kept share) or `chi`.

    `family` fixes b = c (1: a low-rank pair; 0: modes as equal as the sizes allow, as published); left out, 1, 2, 4 and 8 are tried and the least output
    error wins at equal numbers of weights. `refine` steps of L-BFGS under the Gram; `metric=weight` needs no data and does not refine, as published. `sites`
    above 2 are a form of storage (`tensor_train`), rebuilt when the weight is used.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    chi: int | None = option(None, ge=1)
    family: int | None = option(None, ge=0)
    metric: Metric = Metric.INPUT
    refine: int = option(50, ge=0)
    sites: int = option(2, ge=2)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.chi is None):
            raise SpecError("factorize_mpo: give ratio or chi, and not both, for example factorize_mpo{ratio=0.7}")
        if self.metric is Metric.BOTH:
            raise SpecError("factorize_mpo: metric=both is not built for cores; use input, or factorize_svd{metric=both}")
        if self.sites > 2 and (self.metric is not Metric.WEIGHT or self.family is not None):
            raise SpecError(
                f"factorize_mpo: sites={self.sites} stores balanced cores of the weight alone, for example factorize_mpo{{ratio=0.5,sites=3,metric=weight}}"
            )

    @property
    def needs(self) -> Need:
        """The input Gram, unless only the weight counts."""
        return Need.NONE if self.metric is Metric.WEIGHT else Need.GRAM

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def planned_format(self, site: WeightSite) -> TensorTrain | None:
        """The form of storage of three and more sites."""
        stored = self._stored(site) if self.sites > 2 else None
        return stored if isinstance(stored, TensorTrain) else None

    def _stored(self, site: WeightSite) -> TensorTrain | str:
        outputs, inputs = balanced_modes(site.rows, self.sites), balanced_modes(site.columns, self.sites)
        exact = full_bonds(outputs, inputs)
        chi = self.chi or max((c for c in range(1, max(exact) + 1) if train_parameters(outputs, inputs, c) <= (self.ratio or 1.0) * site.parameters), default=0)
        count = train_parameters(outputs, inputs, max(chi, 1))
        if chi > max(exact):
            return f"chi={chi} is more than the exact bond {max(exact)}; use a smaller one"
        if chi < 1 or count > site.parameters:
            return f"{self.sites} cores of bond {max(chi, 1)} hold {count:,} weights, the weight itself {site.parameters:,}"
        return TensorTrain(outputs=outputs, inputs=inputs, bonds=tuple(min(chi, b) for b in exact))

    def why_not(self, site: WeightSite) -> str | None:
        """As for all factorizations, and cores that are no smaller than the weight."""
        if self.sites == 2:
            return super().why_not(site)
        stored = why_not_compressible(site) or self._stored(site)
        return stored if isinstance(stored, str) else None

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """A chain of two products, or stored cores."""
        fmt = self.planned_format(site)
        if fmt is None:
            return super().rewrite_site(editor, site, decision, statistics, ctx)
        matrix = site.matrix().float()
        payload = fmt.encode(matrix.to(site.dtype))
        error = float((fmt.decode(payload, site.rows, site.columns, torch.float32) - matrix).norm() / matrix.norm().clamp_min(1e-30))
        facts = {"chi": float(max(fmt.bonds)), "kept": sum(t.numel() for t in payload.values()) / site.parameters, "weight_error": error}
        editor.compress(site, fmt, payload, f"factorize_mpo: {self.sites} cores", facts)
        after = sum(t.nbytes for t in payload.values())
        return SiteResult(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, facts=facts)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Chains or formats without data."""
        if self.sites == 2:
            super().preview(program, plan, ctx)
        else:
            SitePass.preview(self, program, plan, ctx)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """Cores of the first member that is tried; all hold about as many weights."""
        found = self._members(site)
        if isinstance(found, str):
            return found
        modes, chi = found[0]
        first, second = torch.empty(modes.a, modes.b, chi, device="meta"), torch.empty(chi, modes.c, modes.d, device="meta")
        return as_chain(Cores(first=first, second=second, rows=site.rows, columns=site.columns))

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """Adds nothing to the plan of every factorization; the estimate counts the refinement."""
        if (fmt := self.planned_format(site)) is not None:
            after = fmt.nbytes(site.rows, site.columns, site.dtype)
            return Decision(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, flops=20.0 * site.rows * site.parameters)
        plan = super().decide(site, ctx)
        work = 6.0 * self.refine * site.rows * site.columns**2 * (len(FAMILY) - 1 if self.family is None else 1)
        return Decision(
            site=plan.site, action=plan.action, bytes_before=plan.bytes_before, bytes_after=plan.bytes_after, flops=plan.flops + work, facts=plan.facts
        )

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None) -> tuple[Chain | str, dict[str, float]]:
        """The member with the least error, its t, its bond and the error; multiply-adds a token over the dense weight's."""
        members = self._members(site)
        assert not isinstance(members, str)
        gram = None if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None else statistics.gram[0]
        best: tuple[float, Cores, Modes, int] | None = None
        errors: dict[str, float] = {}
        for modes, chi in members:
            cores, error = fit(matrix, modes, chi, gram, self.refine)
            errors[f"error_t{modes.b}"] = error
            if best is None or error < best[0]:
                best = (error, cores, modes, chi)
        assert best is not None
        error, cores, modes, chi = best
        work = min(modes.multiplications(chi)) / site.parameters
        kind = "weight_error" if gram is None else "output_error"
        facts = {"t": float(modes.b), "chi": float(chi), kind: error, "multiplications": work}
        return as_chain(cores), facts | (errors if len(members) > 1 else {})

    def _members(self, site: WeightSite) -> list[tuple[Modes, int]] | str:
        """Modes to try with their bonds, or why none is smaller than the weight."""
        tried = [self._modes(site, t) for t in (FAMILY if self.family is None else (self.family,))]
        found = [(modes, self.chi or int((self.ratio or 1.0) * site.parameters / modes.parameters(1))) for modes in tried]
        if self.chi is not None and self.chi > max(m.full for m in tried):
            return f"chi={self.chi} is more than the exact bond {max(m.full for m in tried)}; use a smaller one"
        fitting = [(modes, chi) for modes, chi in found if 1 <= chi <= modes.full and modes.parameters(chi) <= site.parameters]
        if not fitting:
            modes, chi = found[0]
            return f"cores of bond {max(chi, 1)} hold {modes.parameters(max(chi, 1)):,} weights, the weight itself {site.parameters:,}"
        return fitting

    def _modes(self, site: WeightSite, t: int) -> Modes:
        if t != BALANCED:
            return family(site.rows, site.columns, t)
        (a, c), (b, d) = balanced_modes(site.rows, 2), balanced_modes(site.columns, 2)
        return Modes(a=a, b=b, c=c, d=d)
