"""CP convolutions: a kernel becomes a 1x1 convolution, one-way filters along each axis of the kernel, and a 1x1 convolution back.

Source: Lebedev et al. (arXiv 1412.6553). Terms are kept from growing and cancelling (`cp`). Finding them under the Grams of channels and positions and fitting
the last factor to the data of the convolution, a least-squares problem in closed form, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ir.chain import Chain, Convolution
from ..ir.errors import SpecError
from ..ir.oneway import kernel_axes
from ..ir.site_calls import conv_geometry
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Need
from .calibrate import Statistics, why_not_observable
from .conv_data import ConvData
from .cp import STARTS, SWEEPS, Canonical, decompose, khatri_rao
from .factorize_svd import Metric
from .factorizing import Factorization, empty
from .kronecker_sum import roots
from .relative import relative_error


@dataclass(frozen=True, kw_only=True)
class FactorizeCp(Factorization):
    """`weight: [F, C, *k]` becomes `reduce: [R, C, 1..]`, a one-way filter of R channels along each axis of the kernel, and `expand: [F, R, 1..]`.

    Give `rank`, or `ratio` (kept share of each kernel's numbers). `metric=input` fits the terms to calibration data. The best of `starts` is
    kept, each of at most `sweeps`; large kernels get one. Grouped and 1x1 kernels are left alone.
    """

    rank: int | None = option(None, ge=1)
    ratio: float | None = option(None, gt=0.0, le=1.0)
    metric: Metric = Metric.INPUT
    starts: int = option(STARTS, ge=1)
    sweeps: int = option(SWEEPS, ge=1)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rank is None) == (self.ratio is None):
            raise SpecError("factorize_cp: give rank or ratio, and not both, for example factorize_cp{rank=32}")
        if self.metric is Metric.BOTH:
            raise SpecError("factorize_cp: metric=both is not built for kernels; use input or weight")

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Convolutions."""
        return frozenset(CONVOLUTIONS)

    @property
    def needs(self) -> Need:
        """The data of the convolution, unless only the kernel counts."""
        return Need.NONE if self.metric is Metric.WEIGHT else Need.INPUTS

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites factorized."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """Grouped and 1x1 convolutions besides what every factorization leaves."""
        if site.groups > 1:
            return f"it has {site.groups} groups; CP mixes all channels"
        if not kernel_axes(site.shape):
            return "a kernel of one position has no axis to filter along"
        return why_not_observable(site) or super().why_not(site)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """The chain of the known rank."""
        rank = self._rank(site)
        count = rank * _numbers(site)
        if rank < 1:
            return f"ratio={self.ratio} leaves no rank: one term holds {_numbers(site):,} of {site.parameters:,} weights"
        if count >= site.parameters:
            return f"rank {rank} holds {count:,} weights, the kernel itself {site.parameters:,}"
        return _chain(site, [empty(size, rank) for size in _sizes(site)])

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """The factors, their rank, the relative error, and how large the terms are together beside the kernel (above 1: they cancel in part)."""
        tensor = matrix.view(_sizes(site)).double()
        data = ConvData(site, statistics.inputs) if self.metric is Metric.INPUT and statistics is not None and statistics.inputs else None
        found = self._terms(tensor, self._rank(site), data)
        facts = {"rank": float(self._rank(site)), "terms": found.terms / max(float(tensor.norm()), 1e-300)}
        if data is not None:
            fitted, error = data.fitted(_chain(site, [f.float() for f in found.factors]), matrix)
            return fitted, facts | {"output_error": error}
        gram = None if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None else statistics.gram[0].double()
        if gram is not None:
            found = _fitted(found, matrix.double(), gram)
        delta = found.tensor().flatten(1) - matrix.double()
        left, power = (float((x @ gram * x).sum() if gram is not None else x.square().sum()) for x in (delta, matrix.double()))
        facts["weight_error" if gram is None else "output_error"] = relative_error(left, power)
        return _chain(site, [f.float() for f in found.factors]), facts

    def _terms(self, tensor: Tensor, rank: int, data: ConvData | None) -> Canonical:
        """Of the kernel `[F, C, *k]`, found under the Grams of its channels and positions where there are data and one axis."""
        made = partial(decompose, rank=rank, generator=torch.Generator().manual_seed(0), starts=self.starts, sweeps=self.sweeps)
        if data is None or tensor.dim() != 3:
            return made(tensor)
        (root, inverse), (other, back) = roots(data.channels()), roots(data.positions())
        first, second, third = made(torch.einsum("fcp,cd->fdp", tensor, root) @ other).factors
        return Canonical(factors=(first, inverse @ second, back @ third))

    def _rank(self, site: WeightSite) -> int:
        return self.rank if self.rank is not None else int((self.ratio or 0.0) * site.parameters / _numbers(site))


def _fitted(found: Canonical, matrix: Tensor, gram: Tensor) -> Canonical:
    """The same filters with the first factor `[F, R]` of least squares for what they make of the data; the old one where that is no better."""
    filters = khatri_rao(found.factors[1:]).t()  # [R, C * positions]
    inner = filters @ gram @ filters.t()
    damping = max(1e-7 * float(inner.diagonal().mean()), 1e-30)
    cross = (matrix @ gram @ filters.t()) + damping * found.factors[0]  # damped towards the old factor
    first = torch.linalg.solve(inner + damping * torch.eye(len(inner), dtype=inner.dtype), cross.t()).t()
    fitted = Canonical(factors=(first, *found.factors[1:]))

    def left(one: Canonical) -> float:
        delta = one.tensor().flatten(1) - matrix
        return float((delta @ gram * delta).sum())

    return min(fitted, found, key=left)


def _sizes(site: WeightSite) -> tuple[int, ...]:
    """Of the modes: outputs, inputs, and each axis of the kernel with more than one position."""
    return (site.rows, site.shape[1], *(site.shape[axis] for axis in kernel_axes(site.shape)))


def _numbers(site: WeightSite) -> int:
    """Weights of one term."""
    return sum(_sizes(site))


def _chain(site: WeightSite, factors: list[Tensor]) -> Chain:
    """Factors `[F, R]`, `[C, R]` and one `[k, R]` for each axis; a filter takes stride, padding and dilation of its axis, the first of flat ones too."""
    stride, padding, dilation = conv_geometry(site)
    count, rank = len(stride), factors[0].shape[1]
    ones, zeros = (1,) * count, (0,) * count
    reduce = Convolution(name="reduce", weight=factors[1].t().reshape(rank, -1, *ones).contiguous(), stride=ones, padding=zeros, dilation=ones)
    filters = []
    for number, (axis, factor) in enumerate(zip(kernel_axes(site.shape), factors[2:], strict=True)):
        mine = [i for i in range(count) if i == axis - 2 or (number == 0 and site.shape[2 + i] == 1)]
        shape = [len(factor) if i == axis - 2 else 1 for i in range(count)]
        moved = [tuple(v[i] if i in mine else neutral for i in range(count)) for v, neutral in ((stride, 1), (padding, 0), (dilation, 1))]
        filters.append(
            Convolution(
                name=f"filter{number}",
                weight=factor.t().reshape(rank, 1, *shape).contiguous(),
                stride=moved[0],
                padding=moved[1],
                dilation=moved[2],
                groups=rank,
            )
        )
    expand = Convolution(name="expand", weight=factors[0].reshape(-1, rank, *ones), stride=ones, padding=zeros, dilation=ones)
    return reduce, *filters, expand
