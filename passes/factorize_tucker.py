"""Tucker-2 convolutions: a kernel becomes a 1x1 convolution to fewer channels, a small kernel between few channels, and a 1x1 convolution back.

Source: Kim et al. (arXiv 1511.06530). Factors fitted to the data of the convolution are ours (`tucker`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..ir.chain import Chain, Convolution
from ..ir.errors import SpecError
from ..ir.site_calls import conv_geometry
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Need
from .calibrate import Statistics, why_not_observable
from .factorize_svd import Metric
from .factorizing import Factorization, empty
from .tucker import decompose, energy_rank, evbmf_rank

STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class FactorizeTucker(Factorization):
    """`weight: [F, C, *k]` becomes `reduce: [Rc, C, 1..]`, `core: [Rf, Rc, *k]`, `expand: [F, Rf, 1..]`; the core takes stride, padding and dilation.

    Ranks by `ratio` (kept share of each kernel's numbers, Rc / C = Rf / F), `tolerance` (relative error of the kernel along each mode) or `evbmf` (components
    above the noise, a hint). `metric=input` fits the factors to calibration data, `weight` to the kernel alone. Grouped and 1x1 kernels are left alone.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    tolerance: float | None = option(None, gt=0.0, lt=1.0)
    evbmf: bool = False
    metric: Metric = Metric.INPUT
    multiple: int = option(1, ge=1)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is not None) + (self.tolerance is not None) + self.evbmf != 1:
            raise SpecError("factorize_tucker: give exactly one of ratio, tolerance and evbmf, for example factorize_tucker{ratio=0.4}")
        if self.metric is Metric.BOTH:
            raise SpecError("factorize_tucker: metric=both is not built for kernels; use input or weight")

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Convolutions."""
        return frozenset(CONVOLUTIONS)

    @property
    def needs(self) -> Need:
        """The Gram of the patches, unless only the kernel counts."""
        return Need.NONE if self.metric is Metric.WEIGHT else Need.GRAM

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """Grouped and 1x1 convolutions besides what every factorization leaves."""
        if site.groups > 1:
            return f"it has {site.groups} groups; Tucker-2 mixes all channels"
        if prod(site.shape[2:]) == 1:
            return "a kernel of one position has nothing to share between positions"
        return why_not_observable(site) or super().why_not(site)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """Three convolutions of the known ranks; where the ranks depend on the weight, of those that it gives."""
        rank_in, rank_out = self._ranks(site)
        if min(rank_in, rank_out) < self.multiple:
            return f"ratio={self.ratio} leaves no ranks of at least {self.multiple}"
        count = _count(site, rank_in, rank_out)
        if count >= site.parameters:
            return f"factors of ranks {rank_in} and {rank_out} hold {count:,} weights, the kernel itself {site.parameters:,}"
        fields = site.shape[2:]
        return _chain(site, empty(rank_in, site.shape[1]), empty(rank_out, rank_in, prod(fields)), empty(site.rows, rank_out))

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None) -> tuple[Chain | str, dict[str, float]]:
        """The factors, their ranks, and the relative error (of outputs, or of the kernel)."""
        rank_in, rank_out = self._ranks(site)
        kernel = matrix.view(site.rows, site.shape[1], -1)
        gram = None if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None else statistics.gram[0]
        found = decompose(kernel, rank_in, rank_out, gram)
        delta = (found.kernel() - kernel).flatten(1).double()
        c = gram.double() if gram is not None else None
        left, power = (float((x @ c * x).sum()) if c is not None else float(x.square().sum()) for x in (delta, matrix.double()))
        error = (max(left, 0.0) / max(power, 1e-300)) ** 0.5
        facts = {"rank_in": float(rank_in), "rank_out": float(rank_out), "weight_error" if gram is None else "output_error": error}
        return _chain(site, found.reduce, found.core, found.expand), facts

    def _ranks(self, site: WeightSite) -> tuple[int, int]:
        channels, rows = site.shape[1], site.rows
        if self.ratio is not None:
            return self._by_ratio(site, self.ratio)
        kernel = site.matrix().float().view(rows, channels, -1)
        if kernel.is_meta:  # a plan for what an earlier pass will make: its values are not there yet
            return self._by_ratio(site, 1.0)
        unfolded = kernel.transpose(0, 1).flatten(1), kernel.flatten(1)
        if self.evbmf:
            rank_in, rank_out = (max(evbmf_rank(m), 1) for m in unfolded)
        else:
            assert self.tolerance is not None
            rank_in, rank_out = (energy_rank(torch.linalg.svdvals(m.double()).square(), self.tolerance) for m in unfolded)
        up = self.multiple
        return min(-(-rank_in // up) * up, channels), min(-(-rank_out // up) * up, rows)

    def _by_ratio(self, site: WeightSite, ratio: float) -> tuple[int, int]:
        """The largest ranks of equal shares of their channels that keep the ratio."""
        channels, rows, best = site.shape[1], site.rows, (0, 0)
        for step in range(1, STEPS + 1):
            rank_in, rank_out = (int(step / STEPS * size) // self.multiple * self.multiple for size in (channels, rows))
            if min(rank_in, rank_out) >= 1 and _count(site, rank_in, rank_out) <= ratio * site.parameters:
                best = rank_in, rank_out
        return best


def _count(site: WeightSite, rank_in: int, rank_out: int) -> int:
    """Numbers in the three factors."""
    return rank_in * site.shape[1] + prod(site.shape[2:]) * rank_in * rank_out + site.rows * rank_out


def _chain(site: WeightSite, reduce: Tensor, core: Tensor, expand: Tensor) -> Chain:
    stride, padding, dilation = conv_geometry(site)
    fields, ones, zeros = site.shape[2:], (1,) * (len(site.shape) - 2), (0,) * (len(site.shape) - 2)

    def pointwise(name: str, weight: Tensor) -> Convolution:
        return Convolution(name=name, weight=weight.reshape(*weight.shape, *ones), stride=ones, padding=zeros, dilation=ones)

    middle = Convolution(name="core", weight=core.reshape(*core.shape[:2], *fields), stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    return pointwise("reduce", reduce), middle, pointwise("expand", expand)
