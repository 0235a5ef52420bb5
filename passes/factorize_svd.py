"""Low-rank pairs: a weight becomes two, of the best rank-r approximation under the inputs that the site sees.

Sources: truncated SVD (Eckart and Young); whitened by the input Gram as in SVD-LLM (arXiv 2403.07378, section 3.1); outputs weighted by Fisher information as
in FWSVD (arXiv 2207.00112). Both metrics together, and the form without inverses, are ours (see `spectra`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ..ir.chain import Chain, Product
from ..ir.errors import SpecError
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Need
from .calibrate import Statistics
from .factorizing import Factorization, empty
from .spectra import Spectrum, spectrum


class Metric(Enum):
    """What the error is measured in."""

    WEIGHT = "weight"  # of the weight itself: no data needed
    INPUT = "input"  # of the outputs on calibration data
    BOTH = "both"  # of the outputs, each output counting by its Fisher information: needs training data


@dataclass(frozen=True, kw_only=True)
class FactorizeSvd(Factorization):
    """`weight: [N, K]` becomes `down: [r, K]`, `up: [N, r]`. Give one of `ratio` (kept share of each weight), `rank`, or `tolerance` (relative output error).

    Ranks are rounded down to a multiple of `multiple`. With `tolerance`, a weight whose pair would not be smaller than it stays as it is, with its reason
    in the report. The Gram covers what reaches the site at that moment: with `sequential`, from weights that are factorized already.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    rank: int | None = option(None, ge=1)
    tolerance: float | None = option(None, gt=0.0, lt=1.0)
    metric: Metric = Metric.INPUT
    multiple: int = option(1, ge=1)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(v is not None for v in (self.ratio, self.rank, self.tolerance)) != 1:
            raise SpecError("factorize_svd: give exactly one of ratio, rank and tolerance, for example factorize_svd{ratio=0.8}")

    @property
    def needs(self) -> Need:
        """As the metric says."""
        return {Metric.WEIGHT: Need.NONE, Metric.INPUT: Need.GRAM, Metric.BOTH: Need.GRAM | Need.FISHER}[self.metric]

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

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
        return _pair(empty(rank, site.columns), empty(site.rows, rank))

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None) -> tuple[Chain | str, dict[str, float]]:
        """The pair, and its relative output error (of the weight, with `metric=weight`)."""
        found = self._spectrum(site, matrix, statistics)
        rank = self.rank or self._rounded(_most(site, self.ratio or 1.0))
        if self.tolerance is not None:
            rank = -(-found.rank_for(self.tolerance) // self.multiple) * self.multiple
            if rank > _most(site, 1.0):
                return _no_smaller(site, rank), {}
        facts = {"rank": float(rank), "weight_error" if self.metric is Metric.WEIGHT else "output_error": found.error(rank)}
        return _pair(*found.factors(rank)), facts

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


def _pair(down: Tensor, up: Tensor) -> Chain:
    return Product(name="down", weight=down), Product(name="up", weight=up)
