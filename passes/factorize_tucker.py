"""Tucker convolutions: a kernel becomes a 1x1 convolution to fewer channels, a small kernel between few channels, and a 1x1 convolution back.

Source: Kim et al. (arXiv 1511.06530). Factors fitted to the data of the convolution (`tucker`, `conv_data`) and `form=taps`, one-way filters that all channels
share (`tucker_taps`), are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

import torch
from torch import Tensor

from ..ir.chain import Chain, Convolution, Flatten, Link, Swap, Unflatten
from ..ir.errors import SpecError
from ..ir.site_calls import conv_geometry
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Need
from .calibrate import Statistics, site_rows, why_not_observable
from .conv_data import ConvData
from .factorize_svd import Metric
from .factorizing import Factorization, empty
from .relative import relative_error
from .tucker import Tucker2, decompose, energy_rank, evbmf_rank
from .tucker_taps import Metrics, Sizes, Whitened, balanced, within

STEPS = 1000
WHOLE = 2048  # columns of a kernel up to which the whole Gram of its patches is formed


class Form(Enum):
    """What stands between few channels."""

    KERNEL = "kernel"  # a kernel of all positions: Tucker-2
    TAPS = "taps"  # a few one-way filters, the same for every channel


class Ranks(Enum):
    """How a ratio is shared between both sides of a kernel."""

    EQUAL = "equal"  # Rc / C = Rf / F
    ERROR = "error"  # as the kernel loses least


@dataclass(frozen=True, kw_only=True)
class FactorizeTucker(Factorization):
    """`weight: [F, C, *k]` becomes `reduce: [Rc, C, 1..]`, `core: [Rf, Rc, *k]`, `expand: [F, Rf, 1..]`; the core takes stride, padding and dilation.

    With `form=taps` (kernels along one axis) `reduce: [Rc, C, 1..]`, `taps: [Rk, 1, *k]` on every channel alone and `mix: [F, Rk, Rc]`. A factor that keeps
    all channels is left out. Ranks by `ratio` (kept share of each kernel's numbers, Rc / C = Rf / F, or with `ranks=error` by the energy lost; of taps also of
    its multiply-adds, ranks by the least error), `tolerance` (relative error along each mode) or `evbmf` (components above the noise, a hint). `metric=input`
    fits the factors to calibration data, `weight` to the kernel alone. Grouped and 1x1 kernels are left alone.
    """

    ratio: float | None = option(None, gt=0.0, le=1.0)
    tolerance: float | None = option(None, gt=0.0, lt=1.0)
    evbmf: bool = False
    form: Form = Form.KERNEL
    ranks: Ranks = Ranks.EQUAL
    metric: Metric = Metric.INPUT
    multiple: int = option(1, ge=1)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is not None) + (self.tolerance is not None) + self.evbmf != 1:
            raise SpecError("factorize_tucker: give exactly one of ratio, tolerance and evbmf, for example factorize_tucker{ratio=0.4}")
        if self.metric is Metric.BOTH:
            raise SpecError("factorize_tucker: metric=both is not built for kernels; use input or weight")
        if self.evbmf and self.form is Form.TAPS:
            raise SpecError("factorize_tucker: evbmf counts input and output channels, which form=taps does not have; give ratio or tolerance")

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
        """Grouped and 1x1 convolutions besides what every factorization leaves; for taps those along two axes."""
        if site.groups > 1:
            return f"it has {site.groups} groups; Tucker mixes all channels"
        if prod(site.shape[2:]) == 1:
            return "a kernel of one position has nothing to share between positions"
        if self.form is Form.TAPS and (reason := _why_no_taps(site)) is not None:
            return reason
        return why_not_observable(site) or super().why_not(site)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """The chain of the known ranks; where the ranks depend on the weight, of those that it gives."""
        if self.form is Form.TAPS:
            return self._planned_taps(site)
        rank_in, rank_out = self._ranks(site)
        if min(rank_in, rank_out) < 1:
            return f"ratio={self.ratio} leaves no ranks of at least {self.multiple}"
        count = _count(site, rank_in, rank_out)
        if count >= site.parameters:
            return f"factors of ranks {rank_in} and {rank_out} hold {count:,} weights, the kernel itself {site.parameters:,}"
        fields = site.shape[2:]
        return _chain(site, empty(rank_in, site.shape[1]), empty(rank_out, rank_in, prod(fields)), empty(site.rows, rank_out))

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """The factors, their ranks, and the relative error (of outputs, or of the kernel)."""
        kernel = matrix.view(site.rows, site.shape[1], -1)
        data = ConvData(site, statistics.inputs) if self.metric is Metric.INPUT and statistics is not None and statistics.inputs else None
        if self.form is Form.TAPS:
            return self._taps(site, kernel, data)
        rank_in, rank_out = self._ranks(site)
        facts = {"rank_in": float(rank_in), "rank_out": float(rank_out)}
        gram = None if self.metric is Metric.WEIGHT or statistics is None or statistics.gram is None else statistics.gram[0]
        if gram is None and data is not None and site.columns <= WHOLE:
            gram = _gram(site, data)
        if gram is None and data is not None:
            found = Whitened.of(kernel, Metrics(channels=data.channels(), positions=data.positions())).tucker2(rank_in, rank_out)
            chain, error = data.fitted(_of(site, found), matrix)
            return chain, facts | {"output_error": error}
        found = decompose(kernel, rank_in, rank_out, gram)
        return _of(site, found), facts | {"weight_error" if gram is None else "output_error": _error(found.kernel(), kernel, gram)}

    def _planned_taps(self, site: WeightSite) -> Chain | str:
        """Ranks of equal shares within the ratio; which are best is known only from the kernel and its data."""
        sizes = _sizes(site)
        budget = (1.0 if self.ratio is None else self.ratio) * site.parameters
        steps = ([min(max(int(s / STEPS * n) // self.multiple, 1) * self.multiple, n) for n in (sizes.channels, sizes.positions)] for s in range(1, STEPS + 1))
        fitting = [(r, j) for r, j in steps if sizes.work(r, j) <= budget]
        if not fitting:
            return f"ratio={self.ratio} leaves no channels and taps of at least {self.multiple}"
        rank, taps = fitting[-1]
        return _taps_chain(site, empty(rank, sizes.channels), empty(taps, sizes.positions), empty(site.rows, taps, rank))

    def _taps(self, site: WeightSite, kernel: Tensor, data: ConvData | None) -> tuple[Chain | str, dict[str, float]]:
        """As many channels and taps as lose least within the ratio, or as lose no more than the tolerance."""
        whitened = Whitened.of(kernel, Metrics(channels=data.channels(), positions=data.positions()) if data is not None else Metrics())
        tails, sizes = whitened.tails(), _sizes(site)
        if self.ratio is not None:
            rank, taps = balanced(tails, sizes, self.multiple, self.ratio * site.parameters)
        else:
            assert self.tolerance is not None
            rank, taps = within(tails, self.multiple, self.tolerance)
            if (needed := sizes.work(rank, taps)) >= site.parameters:
                return f"{rank} channels and {taps} taps take {needed:,.0f} multiply-adds a position, the kernel itself {site.parameters:,}", {}
        found = whitened.taps(rank, taps)
        chain, facts = _taps_chain(site, found.reduce, found.taps, found.mix), {"channels": float(rank), "taps": float(taps)}
        if data is None:
            return chain, facts | {"weight_error": _error(found.kernel(), kernel, None)}
        chain, error = data.fitted(chain, kernel.flatten(1))
        return chain, facts | {"output_error": error}

    def _ranks(self, site: WeightSite) -> tuple[int, int]:
        channels, rows = site.shape[1], site.rows
        if self.ratio is not None and self.ranks is Ranks.EQUAL:
            return self._by_ratio(site, self.ratio)
        kernel = site.matrix().float().view(rows, channels, -1)
        if kernel.is_meta:  # a plan for what an earlier pass will make: its values are not there yet
            return self._by_ratio(site, self.ratio or 1.0)
        unfolded = kernel.transpose(0, 1).flatten(1), kernel.flatten(1)
        if self.ratio is not None:
            return self._by_error(site, self.ratio, unfolded)
        if self.evbmf:
            rank_in, rank_out = (max(evbmf_rank(m), 1) for m in unfolded)
        else:
            assert self.tolerance is not None
            rank_in, rank_out = (energy_rank(torch.linalg.svdvals(m.double()).square(), self.tolerance) for m in unfolded)
        return self._rounded(rank_in, channels), self._rounded(rank_out, rows)

    def _rounded(self, rank: int, size: int) -> int:
        return min(-(-rank // self.multiple) * self.multiple, size)

    def _by_error(self, site: WeightSite, ratio: float, unfolded: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """The ranks within the ratio whose two modes together lose least of the kernel's energy; (0, 0) where none are."""
        lost = [1 - (e := torch.linalg.eigvalsh((m @ m.t()).double()).flip(0).clamp_min(0)).cumsum(0) / e.sum().clamp_min(1e-300) for m in unfolded]
        sides = [[*range(self.multiple, n, self.multiple), n] for n in (site.shape[1], site.rows)]
        fitting = [(i, o) for i in sides[0] for o in sides[1] if _count(site, i, o) <= ratio * site.parameters]
        return min(fitting, key=lambda r: float(lost[0][r[0] - 1] + lost[1][r[1] - 1]), default=(0, 0))

    def _by_ratio(self, site: WeightSite, ratio: float) -> tuple[int, int]:
        """The largest ranks of equal shares of their channels that keep the ratio; one step at least, or all channels where there are fewer."""
        channels, rows, best = site.shape[1], site.rows, (0, 0)
        for step in range(1, STEPS + 1):
            rank_in, rank_out = (min(max(int(step / STEPS * n) // self.multiple, 1) * self.multiple, n) for n in (channels, rows))
            if _count(site, rank_in, rank_out) <= ratio * site.parameters:
                best = rank_in, rank_out
        return best


def _count(site: WeightSite, rank_in: int, rank_out: int) -> int:
    """Numbers in the factors."""
    channels, rows = site.shape[1], site.rows
    return (rank_in * channels if rank_in < channels else 0) + prod(site.shape[2:]) * rank_in * rank_out + (rows * rank_out if rank_out < rows else 0)


def _sizes(site: WeightSite) -> Sizes:
    places = [prod(n.meta["val"].shape[2:]) for n in (site.data, site.node)]
    reads = places[0] / places[1] if all(isinstance(n, int) and n for n in places) else 1.0
    return Sizes(rows=site.rows, channels=site.shape[1], positions=prod(site.shape[2:]), reads=reads)


def _gram(site: WeightSite, data: ConvData) -> Tensor:
    """Of the patches, `[C P, C P] f64`: float32 would hide small errors behind a large mean."""
    found = Statistics(exact=True)
    for rows in (rows for x in data.inputs for rows in site_rows(site, x)):
        found.add(rows, Need.GRAM)
    found.finish()
    assert found.gram is not None
    return found.gram[0]


def _error(found: Tensor, kernel: Tensor, gram: Tensor | None) -> float:
    """Relative error of a kernel `[F, C, P]`, or of what it makes of data with this Gram."""
    delta, whole = (found - kernel).flatten(1).double(), kernel.flatten(1).double()
    left, power = (float((x @ gram.double() * x).sum()) if gram is not None else float(x.square().sum()) for x in (delta, whole))
    return relative_error(left, power)


def _of(site: WeightSite, found: Tucker2) -> Chain:
    return _chain(site, found.reduce, found.core, found.expand)


def _chain(site: WeightSite, reduce: Tensor, core: Tensor, expand: Tensor) -> Chain:
    """Three convolutions; the first or last is multiplied into the core where it keeps all channels."""
    stride, padding, dilation = conv_geometry(site)
    before, after = len(reduce) < site.shape[1], expand.shape[1] < site.rows
    core = core if before else torch.einsum("orp,rc->ocp", core, reduce)
    core = core if after else torch.einsum("orp,fo->frp", core, expand)
    fields = site.shape[2:]
    middle = Convolution(name="core", weight=core.reshape(*core.shape[:2], *fields), stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    links = (_pointwise("reduce", reduce, len(fields)) if before else None, middle, _pointwise("expand", expand, len(fields)) if after else None)
    return tuple(link for link in links if link is not None)


def _pointwise(name: str, weight: Tensor, axes: int) -> Convolution:
    ones, zeros = (1,) * axes, (0,) * axes
    return Convolution(name=name, weight=weight.reshape(*weight.shape, *ones), stride=ones, padding=zeros, dilation=ones)


def _why_no_taps(site: WeightSite) -> str | None:
    """Reason why channels cannot stand where the kernel's flat axis is."""
    long = [axis for axis in range(2, len(site.shape)) if site.shape[axis] > 1]
    if len(long) > 1:
        return f"its kernel {list(site.shape[2:])} is long along two axes; form=taps filters along one, use form=kernel"
    if len(site.shape) == 4:
        flat = 5 - long[0]
        size = site.data.meta["val"].shape[flat]
        if size != 1 or conv_geometry(site)[1][flat - 2]:
            return f"its data has {size} places along the kernel's flat axis, where form=taps needs one without padding; use form=kernel"
    return None


def _taps_chain(site: WeightSite, reduce: Tensor, taps: Tensor, mix: Tensor) -> Chain:
    """Channels become the flat axis of a one-channel image, which the taps filter at once: a convolution of many channels by themselves is slower."""
    stride, padding, dilation = conv_geometry(site)
    two, (count, rank) = len(site.shape) == 4, mix.shape[1:]
    long = next(axis for axis in range(2, len(site.shape)) if site.shape[axis] > 1)  # of the weight
    flat = 5 - long  # 3 for kernels [k] and [k, 1], 2 for [1, k]

    def pair(along: int, other: int) -> tuple[int, int]:
        return (along, other) if long == 2 else (other, along)

    if rank == site.shape[1]:
        mix = torch.einsum("fjr,rc->fjc", mix, reduce)
    start: tuple[Link, ...] = () if rank == site.shape[1] else (_pointwise("reduce", reduce, len(site.shape) - 2),)
    filters = Convolution(
        name="taps",
        weight=taps.reshape(count, 1, *pair(taps.shape[1], 1)),
        stride=pair(stride[long - 2], 1),
        padding=pair(padding[long - 2], 0),
        dilation=pair(dilation[long - 2], 1),
    )
    mixing = Convolution(name="mix", weight=mix.reshape(site.rows, count, *pair(1, rank)), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    moved = Swap(first=-3, second=flat - 4)
    return (*start, moved, filters, mixing) if two else (*start, Unflatten(sizes=(-1, 1)), moved, filters, mixing, Flatten())
