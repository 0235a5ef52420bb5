"""The factorizations a site may get: passes with their ranks fixed, so that a choice is a pass spec and is carried out by that pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ...ir.chain import Chain, weighted
from ...ir.sites import CONVOLUTIONS, WeightSite
from ..calibrate import why_not_observable
from ..factorize_cp import FactorizeCp
from ..factorize_mpo import FactorizeMpo
from ..factorize_svd import FactorizeSvd, Metric
from ..factorize_tucker import FactorizeTucker
from ..factorizing import MATRICES, Factorization
from ..kronecker_sum import family
from .choices import Kind

FAMILY = (2, 4)  # members of the two-site family besides the low-rank pair
BOND_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7)
TUCKER_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
CP_SHARES = (0.05, 0.1, 0.2, 0.35)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is tried: `kinds`, kept shares `j / steps` of low-rank pairs and widths, ranks in multiples of `multiple`, nothing below `min_keep`.

    `metric=both` weights the outputs of low-rank pairs; `refine` steps are spent on the cores of the two-site family that are chosen.
    """

    kinds: frozenset[Kind]
    steps: int = 20
    multiple: int = 1
    min_keep: float = 0.05
    refine: int = 50
    metric: Metric = Metric.BOTH

    def shares(self) -> list[float]:
        """Kept shares below 1, rising."""
        return [j / self.steps for j in range(1, self.steps) if j / self.steps >= self.min_keep]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A factorization of one site that keeps at most `share` of its weights."""

    kind: Kind
    share: float
    one: Factorization


def candidates(site: WeightSite, space: Space) -> list[Candidate]:
    """What the site may become, each once; empty where `why_none` has a reason."""
    if why_none(site, space) is not None:
        return []
    makers = {Kind.SVD: _pairs, Kind.MPO: _cores, Kind.TUCKER: _tuckers, Kind.CP: _terms}
    found = [c for kind, make in makers.items() if kind in space.kinds for c in make(site, space)]
    legal = [c for c in found if c.one.why_skip(site) is None]
    return list({c.one.to_spec(): c for c in reversed(legal)}.values())[::-1]


def why_none(site: WeightSite, space: Space) -> str | None:
    """Reason why nothing can be tried at the site, or None."""
    if site.kind not in (*MATRICES, *CONVOLUTIONS):
        return "an embedding is looked up, not multiplied; factors are planned for linears and convolutions"
    if (reason := why_not_observable(site)) is not None:
        return reason
    return FactorizeSvd(rank=1, convolutions=True).why_skip(site)


def _pairs(site: WeightSite, space: Space) -> Iterator[Candidate]:
    """The ranks that `factorize_svd` takes at these ratios."""
    for share in space.shares():
        planned = FactorizeSvd(ratio=share, multiple=space.multiple).planned_chain(site)
        if not isinstance(planned, str):
            rank = len(weighted(planned)[0].weight)
            yield Candidate(kind=Kind.SVD, share=share, one=FactorizeSvd(rank=rank, metric=space.metric, convolutions=site.kind in CONVOLUTIONS))


def _cores(site: WeightSite, space: Space) -> Iterator[Candidate]:
    for t in FAMILY:
        one = family(site.rows, site.columns, t).parameters(1)
        for share in BOND_SHARES:
            chi = int(share * site.parameters / one) // space.multiple * space.multiple
            if site.kind in MATRICES and share >= space.min_keep and chi >= 1:
                yield Candidate(kind=Kind.MPO, share=share, one=FactorizeMpo(chi=chi, family=t, refine=space.refine))


def _tuckers(site: WeightSite, space: Space) -> Iterator[Candidate]:
    for share in TUCKER_SHARES:
        one = FactorizeTucker(ratio=share, multiple=space.multiple)
        if share >= space.min_keep and one.why_skip(site) is None and _useful(one.planned_chain(site)):
            yield Candidate(kind=Kind.TUCKER, share=share, one=one)


def _useful(planned: Chain | str) -> bool:
    """Whether no rank of a Tucker core is more than the other rank and the positions allow."""
    if isinstance(planned, str):
        return False
    core = max(weighted(planned), key=lambda link: prod(link.weight.shape[2:])).weight
    rows, columns, positions = len(core), core.shape[1], prod(core.shape[2:])
    return rows <= columns * positions and columns <= rows * positions


def _terms(site: WeightSite, space: Space) -> Iterator[Candidate]:
    for share in CP_SHARES:
        if share < space.min_keep or site.kind not in CONVOLUTIONS or FactorizeCp(ratio=share).why_skip(site) is not None:
            continue
        planned = FactorizeCp(ratio=share).planned_chain(site)
        rank = 0 if isinstance(planned, str) else len(weighted(planned)[0].weight) // space.multiple * space.multiple
        if rank >= 1:
            yield Candidate(kind=Kind.CP, share=share, one=FactorizeCp(rank=rank))
