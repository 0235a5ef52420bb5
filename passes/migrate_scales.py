"""Move a positive scale a channel across the program's scale pairs, so that the consumers' weights lose less when they are quantized.

Producers are divided by `s`, the input columns of their consumers multiplied by it: `W diag(s) (x / s) = W x`, so the function stays what it is.
`awq`: Lin et al., "AWQ", MLSys 2024 (arXiv 2306.00978), equations 4 and 5: `s = m^alpha`, m the magnitude of the input channel, alpha of least
`sum ||D X||^2`, `D = Q(W diag(s)) diag(1/s) - W`, over the consumers. Ours: m is the root mean square instead of the mean magnitude, so that the input Gram `G`
alone gives both it and the error, exactly: `tr(D G D^T)`. Channels below 1e-4 of the largest count as that.
`smoothquant`: Xiao et al., "SmoothQuant", ICML 2023 (arXiv 2211.10438), equation 4: `s = max|x|^alpha / max|w|^(1 - alpha)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..ir.edit import Editor
from ..ir.formats.affine import Affine
from ..ir.nodes import get_tensor
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import option
from ..ir.structure import ScaleKind, ScalePair, find_structure
from .base import Decision, Guarantee, Need, Pass, Plan, SiteResult, Skip
from .calibrate import CalibrationWalk, Statistics, site_groups, why_not_observable
from .context import Context
from .ranges import RangeSearch, find_range

SLICE_ELEMENTS = 2**22  # weights quantized at a time while searching
FAINT = 1e-4  # smaller channels count as this share of the largest, which keeps all scales of AWQ within 0.01 .. 100
LIMIT = 1024.0  # SmoothQuant's scales stay within 1/LIMIT .. LIMIT


class Method(Enum):
    """How the scales are found."""

    AWQ = "awq"
    SMOOTHQUANT = "smoothquant"


@dataclass(frozen=True, kw_only=True)
class MigrateScales(Pass):
    """Scales every pair whose consumers the options take, each consumer in one pair; dense weights only.

    `bits`, `group_size`, `symmetric` and `search` describe the quantizer the scales are meant for, simulated as affine round-to-nearest. `grid`: values of
    alpha tried by `awq`, from 0 (no scale: never worse on the calibration data) to below 1. `alpha` is SmoothQuant's. `kinds`: where the scale is put; all
    kinds are exact. `only` and `skip` match consumers; a pair is left out when any of its consumers is. Channels that no data reach or whose weights are all
    zero keep `s = 1`. Weights below fp32 are scaled in fp32 and rounded back, so there the function is equal up to that rounding.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    uses_data: ClassVar[bool] = True
    method: Method = Method.AWQ
    bits: int = option(4, ge=1, le=8)
    group_size: int | None = option(None, ge=1)
    symmetric: bool = False
    search: RangeSearch = RangeSearch.MIN_MAX
    grid: int = option(20, ge=2)
    alpha: float = option(0.5, ge=0.0, le=1.0)
    kinds: tuple[ScaleKind, ...] = tuple(ScaleKind)

    @property
    def format(self) -> Affine:
        """What the consumers are expected to be quantized to."""
        return Affine(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision per pair, at its first consumer; a skip for every site that no pair taken ends in."""
        pairs, skips = self._pairs(program)
        return Plan(pass_spec=self.to_spec(), decisions=tuple(self._decision(p) for p in pairs), skips=skips)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Only values change: later passes plan the same."""

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Search pair by pair on the program as it entered, whose activations are those before any scale, and scale `program`."""
        decisions = {d.site: d for d in plan.decisions}
        entered = program.clone()
        pairs = [p for p in self._pairs(entered)[0] if p.consumers[0].name in decisions]
        found = self._search(entered, pairs, ctx)
        with Editor(program, self.to_spec()) as editor:
            return tuple(self._result(editor, p, f, decisions[p.consumers[0].name]) for p, f in zip(pairs, found, strict=True))

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """How many pairs gained, and how much."""
        if not results:
            return ()
        before, after = (sum(r.facts[f"error_{w}"] for r in results) / len(results) for w in ("before", "after"))
        moved = sum(r.facts["alpha"] > 0 for r in results)
        return (f"{moved} of {len(results)} pairs scaled; mean output error under {self.format.to_spec()} rounded to nearest {before:.4g} -> {after:.4g}",)

    def _pairs(self, program: Program) -> tuple[list[ScalePair], tuple[Skip, ...]]:
        taken: list[ScalePair] = []
        owned: set[str] = set()
        reasons: dict[str, str] = {}
        for pair in find_structure(program).scale_pairs:
            reason = self._why_not(pair, owned)
            if reason is None:
                taken.append(pair)
                owned |= {s.name for s in pair.consumers}
            else:
                reasons |= {s.name: reason for s in pair.consumers if s.name not in reasons}
        return taken, tuple(Skip(s.name, reasons.get(s.name) or self._why_unpaired(s)) for s in program.sites() if s.name not in owned)

    def _why_not(self, pair: ScalePair, owned: set[str]) -> str | None:
        if pair.kind not in self.kinds:
            return f"its pair is of kind {pair.kind.value}, not in kinds={[k.value for k in self.kinds]}"
        for site in pair.consumers:
            if site.name in owned:  # one scale at an input says all: more would only be split between its producers
                return f"{site.name}, which shares its pair, already takes its scale from another pair"
            found = self.why_unnamed(site.name) or why_not_observable(site) or self.format.why_illegal(site.rows, site.columns)
            if found is not None:
                return found if len(pair.consumers) == 1 else f"its pair ends in {site.name} too: {found}"
        return None

    def _why_unpaired(self, site: WeightSite) -> str:
        if (unnamed := self.why_unnamed(site.name)) is not None:
            return unnamed
        if site.compressed:
            return f"already holds {site.format.to_spec()}; migrate scales before quantizing"
        if site.kind is SiteKind.EMBEDDING:
            return "an embedding sees indices, which take no scale"
        return "no scale pair ends here: its input has other readers, another origin than a weight, or passes an operator that does not commute with a scale"

    def _decision(self, pair: ScalePair) -> Decision:
        nbytes = sum(s.nbytes for s in pair.consumers)
        tried = self.grid if self.method is Method.AWQ else 2
        flops = sum(2.0 * tried * s.parameters * s.columns for s in pair.consumers)
        names = ", ".join(s.name.rpartition(".")[2] for s in pair.consumers)
        action = f"scale {pair.size} channels into {names}"
        return Decision(site=pair.consumers[0].name, action=action, bytes_before=nbytes, bytes_after=nbytes, flops=flops, facts={"channels": pair.size})

    def _result(self, editor: Editor, pair: ScalePair, found: _Found, decision: Decision) -> SiteResult:
        moved = found.moves and self._scale(editor, pair, found)
        action = decision.action if moved else f"{decision.action}: left at 1, nothing to gain"
        return SiteResult(
            site=decision.site, action=action, bytes_before=decision.bytes_before, bytes_after=decision.bytes_after, facts=found.facts | dict(decision.facts)
        )

    def _search(self, entered: Program, pairs: Sequence[ScalePair], ctx: Context) -> list[_Found]:
        """The scales of every pair. The walk goes forwards, and a pair's statistics are dropped when all its consumers are reached, mostly at once."""
        known = {n: found for n, p in enumerate(pairs) if (found := _load(ctx, n, p)) is not None}
        waiting = {s.name: n for n, p in enumerate(pairs) for s in p.consumers if n not in known}
        walk = CalibrationWalk(entered, ctx.calibration)
        needs = Need.GRAM | Need.ABS_MAX if self.method is Method.SMOOTHQUANT else Need.GRAM
        seen: dict[str, Statistics] = {}
        for group in ctx.track(site_groups([s for s in entered.sites() if s.name in waiting]), self.name):
            number = waiting[group[0].name]
            pair, statistics = pairs[number], walk.statistics(group, needs)
            seen |= {s.name: statistics for s in group}
            if all(s.name in seen for s in pair.consumers):
                inputs = [_Input(s, pair.index(*at), seen.pop(s.name)) for s, at in zip(pair.consumers, pair.inputs, strict=True)]
                known[number] = self._find(inputs, pair.size)
                _save(ctx, number, pair, known[number])
        return [known[n] for n in range(len(pairs))]

    def _find(self, inputs: list[_Input], size: int) -> _Found:
        """The scales of one pair of `size` scales, and the output error of its consumers without and with them."""
        if self.method is Method.AWQ:
            values = [i / self.grid for i in range(self.grid)]
            candidates = [awq_scales(inputs, size, a) for a in values]
        else:
            values, candidates = [0.0, self.alpha], [torch.ones(size), smoothquant_scales(inputs, size, self.alpha)]
        errors = torch.zeros(len(candidates), dtype=torch.float64)
        for one in inputs:
            errors += one.errors(self.format, self.search, candidates)
        best = int(errors.nan_to_num(nan=torch.inf).argmin()) if self.method is Method.AWQ else 1
        power = max(sum(one.power() for one in inputs), 1e-30)
        before, after = (float((errors[i] / power).sqrt()) for i in (0, best))
        return _Found(candidates[best], {"alpha": values[best], "error_before": before, "error_after": after})

    def _scale(self, editor: Editor, pair: ScalePair, found: _Found) -> bool:
        """Divide the producers and multiply the consumers; false, and nothing done, when a weight would leave its dtype's range."""
        module = editor.program.graph_module
        changed = {name: _scaled(get_tensor(module, name), dim, pair.index(name, dim), 1 / found.scales.double()) for name, dim in pair.producers}
        changed |= {name: _scaled(get_tensor(module, name), dim, pair.index(name, dim), found.scales.double()) for name, dim in pair.inputs}
        if not all(bool(torch.isfinite(t).all()) for t in changed.values()):
            found.facts.update(alpha=0.0, error_after=found.facts["error_before"])
            return False
        readers = _readers(editor.program, changed)
        sites = {s.node: s for s in editor.program.sites()}
        why = f"{self.method.value}: {pair.size} {pair.kind.value} scales moved into {', '.join(s.name for s in pair.consumers)}"
        for node in dict.fromkeys(readers.values()):
            editor.reweight(node, {n: t for n, t in changed.items() if readers[n] is node}, why, found.facts, sites.get(node))
        return True


@dataclass(frozen=True)
class _Found:
    """`scales: [S] f32` and what they do."""

    scales: Tensor
    facts: dict[str, float]

    @property
    def moves(self) -> bool:
        return bool((self.scales != 1).any())


@dataclass(frozen=True)
class _Input:
    """One consumer: which scale each of its input channels takes (`index: [C] int64`, -1 for none), and the statistics of its input."""

    site: WeightSite
    index: Tensor
    statistics: Statistics

    @property
    def gram(self) -> Tensor:
        """`[G, K, K] f32`, G conv groups."""
        assert self.statistics.gram is not None
        return self.statistics.gram

    def per_channel(self, values: Tensor) -> Tensor:
        """`[G, K] -> [C, K / C]` (or `[C, 1]`): the matrix columns of each input channel. A depthwise conv has a channel a group."""
        return values.reshape(len(self.index), -1)

    def weight_peak(self) -> Tensor:
        """Largest magnitude of the weights at each channel, `[C]`."""
        matrix = self.site.matrix().float().abs()
        return self.per_channel(matrix.unflatten(0, (self.site.groups, -1)).amax(1)).amax(1)

    def factor(self, scales: Tensor) -> Tensor:
        """The scales as a factor of the site's matrix: `[1, K]`, for depthwise convs `[N, 1]`."""
        each = torch.where(self.index >= 0, scales[self.index.clamp(min=0)], 1.0)
        if self.site.groups > 1:
            return each.unsqueeze(1)
        return each.repeat_interleave(self.site.columns // len(each)).unsqueeze(0)

    def power(self) -> float:
        """Mean square of the outputs, summed over outputs."""
        return sum(_quadratic(part.float(), self.gram) for part in self._slices(self.site.matrix()))

    def errors(self, fmt: Affine, search: RangeSearch, candidates: Sequence[Tensor]) -> Tensor:
        """Mean square error of the outputs, summed over outputs, when the scaled weight is quantized, `[len(candidates)] f64`."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2).repeat_interleave(self.site.rows // len(self.gram) if self.site.groups > 1 else 1, 0)
        factors = [self.factor(s) for s in candidates]
        total = torch.zeros(len(candidates), dtype=torch.float64)
        for part in self._slices(self.site.matrix()):
            whole = part.float()
            for i, factor in enumerate(factors):
                scaled = (whole * factor).to(self.site.dtype).float()
                if not bool(torch.isfinite(scaled).all()):  # these scales leave the dtype's range
                    total[i] = torch.inf
                    continue
                scale, zero = find_range(fmt, scaled, search, diagonal / factor.square())
                rounded = fmt.dequantize(fmt.quantize(scaled, scale, zero), scale, zero) / factor
                total[i] += _quadratic(rounded - whole, self.gram)
        return total

    def _slices(self, matrix: Tensor) -> Sequence[Tensor]:
        return [matrix] if self.site.groups > 1 else matrix.split(max(1, SLICE_ELEMENTS // self.site.columns))


def awq_scales(inputs: Sequence[_Input], size: int, alpha: float) -> Tensor:
    """`m^alpha`, divided by the root of its largest times its smallest: `[S] f32`."""
    total, count = torch.zeros(size), torch.zeros(size)
    for one in inputs:
        own = one.per_channel(one.gram.diagonal(dim1=1, dim2=2)).mean(1)
        known = one.index >= 0
        total.index_add_(0, one.index[known], own[known])
        count.index_add_(0, one.index[known], torch.ones_like(own[known]))
    magnitude = (total / count.clamp(min=1)).sqrt()
    live = (magnitude > 0) & (_peak(inputs, [i.weight_peak() for i in inputs], size) > 0)
    if not bool(live.any()):
        return torch.ones(size)
    scales = magnitude.clamp(min=float(magnitude[live].max()) * FAINT).pow(alpha)
    return torch.where(live, scales / (scales[live].max() * scales[live].min()).sqrt(), 1.0)


def smoothquant_scales(inputs: Sequence[_Input], size: int, alpha: float) -> Tensor:
    """`max|x|^alpha / max|w|^(1 - alpha)`, `[S] f32`."""
    peaks = [i.per_channel(i.statistics.abs_max).amax(1) for i in inputs if i.statistics.abs_max is not None]
    data, weight = _peak(inputs, peaks, size), _peak(inputs, [i.weight_peak() for i in inputs], size)
    scales = data.pow(alpha) / weight.clamp(min=1e-30).pow(1 - alpha)
    return torch.where((data > 0) & (weight > 0), scales.clamp(1 / LIMIT, LIMIT), 1.0)


def _peak(inputs: Sequence[_Input], values: Sequence[Tensor], size: int) -> Tensor:
    """The largest of the channels' values at each scale, `[S]`."""
    found = torch.zeros(size)
    for one, own in zip(inputs, values, strict=True):
        known = one.index >= 0
        found.scatter_reduce_(0, one.index[known], own[known], "amax")
    return found


def _quadratic(matrix: Tensor, gram: Tensor) -> float:
    """`tr(D G D^T)` of `matrix: [N, K]`, N split evenly over the groups of `gram: [G, K, K]`."""
    grouped = matrix.unflatten(0, (len(gram), -1))
    return float(((grouped @ gram) * grouped).sum(dtype=torch.float64).clamp(min=0))


def _scaled(tensor: Tensor, dim: int, index: Tensor, scales: Tensor) -> Tensor:
    """`tensor` times its scale along `dim`, in fp32 or wider, in its own dtype again."""
    factor = torch.where(index >= 0, scales[index.clamp(min=0)], 1.0).reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.detach().to(wide) * factor.to(wide)).to(tensor.dtype)


def _readers(program: Program, names: dict[str, Tensor]) -> dict[str, fx.Node]:
    """The one node that reads each tensor."""
    return {str(n.target): user for n in program.graph.nodes if n.op == "get_attr" and n.target in names for user in n.users}


def _load(ctx: Context, number: int, pair: ScalePair) -> _Found | None:
    saved = ctx.checkpoint.read(_file(ctx, number)) if ctx.checkpoint is not None else None
    if ctx.checkpoint is None or saved is None or saved[0]["site"] != pair.consumers[0].name:
        return None
    ctx.checkpoint.reused += 1
    return _Found(saved[1]["scales"], saved[0]["facts"])


def _save(ctx: Context, number: int, pair: ScalePair, found: _Found) -> None:
    if ctx.checkpoint is not None:
        ctx.checkpoint.write(_file(ctx, number), {"scales": found.scales}, {"site": pair.consumers[0].name, "facts": found.facts})


def _file(ctx: Context, number: int) -> str:
    return f"stage-{ctx.stage:02d}-scales-{number:05d}"
