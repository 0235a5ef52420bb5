"""Low-rank pairs: a weight becomes two, of the best rank-r approximation under the inputs that the site sees.

Sources: truncated SVD (Eckart and Young); whitened by the input Gram as in SVD-LLM (arXiv 2403.07378, section 3.1); outputs weighted by Fisher information as
in FWSVD (arXiv 2207.00112). Both metrics together, and the form without inverses, are ours (see `spectra`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor
from typing_extensions import Self

from ..ir.chain import Chain, Convolution, Product
from ..ir.errors import SpecError
from ..ir.site_calls import conv_geometry
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Need
from .budgeted import Budgeted
from .calibrate import Statistics, why_not_observable
from .factorizing import MATRICES, empty
from .spectra import Spectrum, spectrum


class Metric(Enum):
    """What the error is measured in."""

    WEIGHT = "weight"  # of the weight itself: no data needed
    INPUT = "input"  # of the outputs on calibration data
    BOTH = "both"  # of the outputs, each output counting by its Fisher information: needs training data


@dataclass(frozen=True, kw_only=True)
class FactorizeSvd(Budgeted):
    """`weight: [N, K]` becomes `down: [r, K]`, `up: [N, r]`.

    Give one of `ratio` (kept share of each weight), `rank`, `tolerance` (relative output error), or `budget` (kept share of all chosen weights together,
    spent where it saves most; see `rank_budget`).

    Ranks are rounded down to a multiple of `multiple`. With `tolerance`, a weight whose pair would not be smaller than it stays as it is, with its reason
    in the report. The Gram covers what reaches the site at that moment: with `sequential`, from weights that are factorized already. With `convolutions`,
    kernels `[F, C, *k]` become `down: [r, C, *k]` and `up: [F, r, 1..]` (Zhang et al., arXiv 1505.06798), under the Gram of their patches.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    rank: int | None = option(None, ge=1)
    tolerance: float | None = option(None, gt=0.0, lt=1.0)
    metric: Metric = Metric.INPUT
    multiple: int = option(1, ge=1)
    convolutions: bool = False
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = (self.ratio, self.rank, self.tolerance, self.budget)
        if sum(v is not None for v in amounts) != 1:
            raise SpecError("factorize_svd: give exactly one of ratio, rank, tolerance and budget, for example factorize_svd{ratio=0.8}")
        self.refuse_unweighable(self.metric is Metric.WEIGHT)

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Linears, and convolutions when asked."""
        return frozenset((*MATRICES, *CONVOLUTIONS) if self.convolutions else MATRICES)

    @property
    def needs(self) -> Need:
        """As the metric says."""
        return {Metric.WEIGHT: Need.NONE, Metric.INPUT: Need.GRAM, Metric.BOTH: Need.GRAM | Need.FISHER}[self.metric]

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """Grouped convolutions besides what every factorization leaves."""
        if site.groups > 1:
            return f"it has {site.groups} groups; a pair mixes all channels"
        return why_not_observable(site) or super().why_not(site)

    def at_rank(self, rank: int) -> Self:
        """Pairs of one rank."""
        return replace(self, budget=None, rank=rank)

    def unit(self, site: WeightSite) -> int:
        """A row of `down` and a column of `up`."""
        return site.rows + site.columns

    @property
    def least(self) -> int:
        """The multiple."""
        return self.multiple

    @property
    def spectral(self) -> str:
        """The metric."""
        return self.metric.value

    def gains(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, sensitivity: Tensor | None) -> Tensor:
        """The spectrum, each component weighted by how much the loss minds the outputs it goes to."""
        return self._spectrum(site, matrix, statistics).weighted_energy(sensitivity)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """A pair of the known rank; with a tolerance, of the largest that still is smaller than the weight."""
        most = _most(site, 1.0)
        rank = self.rank if self.rank is not None else self._rounded(_most(site, self.ratio or 1.0))
        if rank < 1:
            return f"ratio={self.ratio} leaves no rank of at least {self.multiple}"
        if self.rank is not None and self.rank > min(site.rows, site.columns):
            return f"rank={self.rank} is more than the full rank {min(site.rows, site.columns)}; use a smaller one"
        if rank > most:
            return _no_smaller(site, rank)
        return _pair(site, empty(rank, site.columns), empty(site.rows, rank))

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """The pair, and its relative output error (of the weight, with `metric=weight`)."""
        found = self._spectrum(site, matrix, statistics)
        rank = self.rank or self._rounded(_most(site, self.ratio or 1.0))
        if self.tolerance is not None:
            rank = -(-found.rank_for(self.tolerance) // self.multiple) * self.multiple
            if rank > _most(site, 1.0):
                return _no_smaller(site, rank), {}
        facts = {"rank": float(rank), "weight_error" if self.metric is Metric.WEIGHT else "output_error": found.error(rank)}
        return _pair(site, *found.factors(rank)), facts

    def _spectrum(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None) -> Spectrum:
        if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None:
            return spectrum(matrix)
        weights = statistics.fisher[site.name].sum(1) if self.metric is Metric.BOTH else None
        return spectrum(matrix, statistics.gram[0], weights)

    def _rounded(self, rank: int) -> int:
        return rank // self.multiple * self.multiple


def _most(site: WeightSite, ratio: float) -> int:
    """The largest rank whose pair holds at most `ratio` of the weight's numbers (a ratio of 1: fewer than all, or the full rank's)."""
    return int(ratio * site.parameters / (site.rows + site.columns))


def _no_smaller(site: WeightSite, rank: int) -> str:
    pair = rank * (site.rows + site.columns)
    return f"a pair of rank {rank} holds {pair:,} weights, the weight itself {site.parameters:,}; ranks up to {_most(site, 1.0)} are smaller"


def _pair(site: WeightSite, down: Tensor, up: Tensor) -> Chain:
    if site.kind not in CONVOLUTIONS:
        return Product(name="down", weight=down), Product(name="up", weight=up)
    stride, padding, dilation = (tuple(v) for v in conv_geometry(site))
    ones = (1,) * len(stride)
    first = Convolution(name="down", weight=down.reshape(-1, *site.shape[1:]), stride=stride, padding=padding, dilation=dilation)
    return first, Convolution(name="up", weight=up.reshape(*up.shape, *ones), stride=ones, padding=(0,) * len(ones), dilation=ones)
