"""How much of each kind of layer the loss can spare: one weight at a time is factorized at a few ratios, and the rise of the loss is measured.

Source: CompactifAI (arXiv 2401.14109) chooses its uneven layers from such profiles. Same tokens for all points, so that sampling noise cancels; one monotone
curve a (kind, depth), pool-adjacent-violators; straight lines between depths (the fit and the interpolation are ours). Kinds come from the structure, never
from names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from math import exp
from typing import Any

import torch
from torch import Tensor

from ..ir.chain import parameters, run
from ..ir.errors import CalibrationError, PassError
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.structure import Structure, find_structure
from .calibrate import CalibrationWalk, Statistics, site_groups
from .context import Context
from .factorize_svd import FactorizeSvd
from .factorizing import MATRICES, Factorization
from .isotonic import falling
from .losses import Criterion
from .structured.loss import example_loss, gradient_examples, task_criterion
from .tapped import Tapped

RATIOS = (0.2, 0.4, 0.6, 0.8)


class Kind(Enum):
    """What a linear does in its layer."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    QKV = "qkv"  # one site makes several of query, key and value
    UP = "up"
    GATE = "gate"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: with `kept` of the weights of `site` and all others dense, the loss is `loss_ratio` times as large (perplexity: see `Profile`)."""

    site: str
    kind: Kind
    layer: int
    kept: float
    loss_ratio: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured `points` and the layer and kind of every site. `loss_ratio` is of exponentiated mean losses: for a language model, of perplexities."""

    points: tuple[Point, ...]
    places: Mapping[str, tuple[Kind, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the table as it was measured."""
        return {"points": [asdict(p) | {"kind": p.kind.value} for p in self.points]}

    def kept_share(self, site: str, max_ratio: float) -> float:
        """The least share of the weight of `site` at which the loss ratio stays within `max_ratio`; 1: none of the measured ones does."""
        kind, layer = self._place(site)
        shares = {m: _invert(self._curve(kind, m), max_ratio) for m in sorted({p.layer for p in self.points if p.kind is kind})}
        before, after = max((m for m in shares if m <= layer), default=min(shares)), min((m for m in shares if m >= layer), default=max(shares))
        part = (layer - before) / (after - before) if after > before else 0.0
        return (1 - part) * shares[before] + part * shares[after]

    def recipe(self, max_ratio: float, method: Callable[[float, tuple[str, ...]], Factorization] | None = None) -> list[Factorization]:
        """A pass for every kept share (in steps of a hundredth) and the sites that have it; sites that cannot spare anything are in none."""
        chosen: dict[float, list[str]] = {}
        for site in self.places:
            share = -(-round(1e6 * self.kept_share(site, max_ratio)) // 10_000) / 100
            if share < 1:
                chosen.setdefault(share, []).append(site)
        make = method or (lambda ratio, only: FactorizeSvd(ratio=ratio, only=only, allow_empty=True))
        return [make(share, tuple(sites)) for share, sites in sorted(chosen.items())]

    def _place(self, site: str) -> tuple[Kind, int]:
        if site not in self.places:
            raise PassError(f"sensitivity profile: {site!r} is not one of its {len(self.places)} sites ({', '.join(list(self.places)[:3])}, ...)")
        return self.places[site]

    def _curve(self, kind: Kind, layer: int) -> list[tuple[float, float]]:
        """`(kept, loss ratio)` by rising share, ratios falling, ending at the dense weight."""
        found = sorted((p.kept, p.loss_ratio) for p in self.points if p.kind is kind and p.layer == layer)
        return [*zip([k for k, _ in found], falling([r for _, r in found]), strict=True), (1.0, 1.0)]


def _invert(curve: Sequence[tuple[float, float]], most: float) -> float:
    """The least share whose ratio is at most `most`, on straight lines between the points of a falling curve."""
    for (low, high_ratio), (high, low_ratio) in pairwise(curve):
        if high_ratio <= most:
            return low
        if low_ratio <= most:
            return low + (high - low) * (high_ratio - most) / (high_ratio - low_ratio)
    return 1.0


def sensitivity_profile(
    program: Program,
    ctx: Context,
    *,
    ratios: Sequence[float] = RATIOS,
    depths: int = 4,
    method: Callable[[float], Factorization] | None = None,
) -> Profile:
    """Profile of the attention and feed-forward linears of `program`, at `depths` layers spread evenly from the first to the last.

    `method` makes the pass for a ratio (whitened low-rank pairs if left out). Runs the calibration data once for every point, and once to observe inputs.
    """
    if not ctx.calibration:
        raise CalibrationError("sensitivity_profile: it measures the loss on calibration data; pass calibration=[batch, ...]")
    places = site_places(find_structure(program))
    if not places:
        raise PassError("sensitivity_profile: the structure has no attention and no feed-forward linears; use a budget with allocation=loss")
    layers = sorted({layer for _, layer in places.values()})
    chosen = {layers[round(i * (len(layers) - 1) / max(depths - 1, 1))] for i in range(depths)}
    sites = [s for s in program.sites() if s.name in places and places[s.name][1] in chosen]
    passes = [(method or (lambda ratio: FactorizeSvd(ratio=ratio)))(ratio) for ratio in ratios]
    runner = _Runner(program, ctx)
    walk = CalibrationWalk(program, ctx.calibration) if passes[0].needs else None
    points = []
    for group in ctx.track(site_groups(sites), "sensitivity profile"):
        statistics = walk.statistics(group, passes[0].needs) if walk is not None else None
        points += [_point(s, places[s.name], one, statistics, runner) for s in group for one in passes if one.why_not(s) is None]
    return Profile(points=tuple(points), places={name: p for name, p in places.items() if any(q.kind is p[0] for q in points)})


def site_places(structure: Structure) -> dict[str, tuple[Kind, int]]:
    """Kind and layer of the linears of attentions and feed-forward networks in residual blocks, by the name of the site."""
    found: dict[str, tuple[Kind, int]] = {}
    for block in structure.blocks:
        named: list[tuple[WeightSite | None, Kind]] = []
        for a in block.attentions:
            inputs = (Kind.QKV,) * 3 if a.fused else (Kind.QUERY, Kind.KEY, Kind.VALUE)
            named += [*zip((a.q, a.k, a.v), inputs, strict=True), (a.o, Kind.OUTPUT)]
        for f in block.feed_forwards:
            named += [(f.gate, Kind.GATE), *((s, Kind.UP) for s in f.ups), (f.down, Kind.DOWN)]
        for site, kind in named:
            if site is not None and site.kind in MATRICES:
                found.setdefault(site.name, (kind, block.layer))
    return found


def _point(site: WeightSite, place: tuple[Kind, int], one: Factorization, statistics: Statistics | None, runner: _Runner) -> Point:
    chain, _ = one.chain(site, site.matrix().float(), statistics)
    if isinstance(chain, str):
        return Point(site=site.name, kind=place[0], layer=place[1], kept=1.0, loss_ratio=1.0)
    matrix = run(chain, torch.eye(site.columns)).t()
    ratio = runner.ratio({site.tensors[0]: site.from_matrix(matrix.to(site.dtype))})
    return Point(site=site.name, kind=place[0], layer=place[1], kept=parameters(chain) / site.parameters, loss_ratio=ratio)


class _Runner:
    """The loss of a program with some tensors replaced, over the dense program's."""

    def __init__(self, program: Program, ctx: Context) -> None:
        self._program, self._ctx, self._run = program, ctx, Tapped(program)
        self._criterion: Criterion = task_criterion(program, ctx)
        self._examples = gradient_examples(ctx)
        if (why := self._criterion.why_not(self._examples[0])) is not None:
            raise CalibrationError(f"sensitivity_profile: it measures the task's loss, which these batches do not have ({why}); give labelled training batches")
        self._dense = self._loss({})

    def ratio(self, tensors: Mapping[str, Tensor]) -> float:
        """Of exponentiated mean losses, at most e^50."""
        return exp(min(self._loss(tensors) - self._dense, 50.0))

    def _loss(self, tensors: Mapping[str, Tensor]) -> float:
        generator, total = self._ctx.generator(), 0.0
        with torch.no_grad():
            for example in self._examples:
                total += float(example_loss(self._criterion, self._program, example, self._run(example.call, tensors), generator))
        if total != total:
            raise CalibrationError("sensitivity_profile: the loss on the calibration data is not a number; check the batches or use fp32 weights")
        return total / len(self._examples)
