"""Refits that aim at the dense model: the consumer of pruned structures makes the dense model's residual stream again, from the inputs it gets now.

Let t be what the site would have to give so that the stream behind it is that of the dense model on the same tokens: the dense stream minus the stream that
arrives (the dense output where no residual addition follows). On the inputs h of the model as compressed so far, `W' = W_P + (E[t h_P^T] - W_P C_PP) (C_PP +
l)^-1` and a bias for the means: errors of earlier layers are made good where this layer can. The target is that of AA-SVD (arXiv 2604.02119), which is
read in summaries only; the pull towards the weights as they are, and l by two-fold cross-validation, are ours (see `compensate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.edit import Editor
from ...ir.finders.flow import is_add
from ...ir.sites import SiteKind, WeightSite
from ..calibrate import CalibrationWalk, site_groups
from ..context import Context
from .compensate import least_ridge, why_not
from .groups import Consumer, Group
from .obs import damped
from .scores import observable


@dataclass(frozen=True)
class Aim:
    """Moments of inputs h `[K]` and targets t `[N]` over some rows, float64: means, E[h h^T] and E[t h^T] about them, and the variance of t."""

    inputs: Tensor
    target: Tensor
    covariance: Tensor
    cross: Tensor
    power: float

    def error(self, weight: Tensor) -> float:
        """`E |t - W h|^2` about the means, less what no W changes."""
        return float(((weight @ self.covariance) * weight).sum() - 2 * (weight * self.cross).sum())


def compensate_anchored(editor: Editor, kept: Mapping[Group, Tensor], ctx: Context) -> dict[str, float]:
    """Refit every consumer in graph order, zero where columns go. Returns the relative error that is left in each consumer's target."""
    errors = {}
    for consumer, groups, folds, rows in _aims(editor, list(kept), ctx):
        stays = torch.ones(consumer.site.columns, dtype=torch.bool)
        for group in groups:
            owner = consumer.columns(group.axis)
            stays &= (owner < 0) | torch.isin(owner, kept[group])
        if why_not(consumer.site) is None:
            errors[consumer.site.name] = _apply(editor, consumer.site, stays, folds, rows)
    return errors


def _aims(editor: Editor, groups: Sequence[Group], ctx: Context) -> Iterator[tuple[Consumer, list[Group], list[Aim], list[int]]]:
    dense = editor.program.clone()
    nodes = {n.name: n for n in dense.graph.nodes}
    place = {n: i for i, n in enumerate(editor.program.graph.nodes)}
    inputs = {c.site.name: c for g in groups for c in observable(g)}
    now, then = CalibrationWalk(editor.program, ctx.calibration), CalibrationWalk(dense, ctx.calibration)
    for sites in ctx.track(site_groups([s for s in editor.program.sites() if s.name in inputs]), "compensating (anchored)"):
        for consumer in (inputs[s.name] for s in sites):
            site = next(s for s in sites if s.name == consumer.site.name)
            end, stream = _target(site, place)
            now.run_before(site.node)
            then.run_before(nodes[end.name].next)
            wanted = [w if stream is None else w - x for w, x in zip(then.values(nodes[end.name]), now.values(stream or site.data), strict=True)]
            folds = [_aim(list(zip(now.values(site.data), wanted, strict=True)), half, site) for half in (0, 1)]
            held = [g for g in groups if any(c.site.name == site.name for c in g.consumers)]
            yield consumer, held, [aim for aim, _ in folds], [rows for _, rows in folds]


def _target(site: WeightSite, place: Mapping[fx.Node, int]) -> tuple[fx.Node, fx.Node | None]:
    """The addition that the site's output goes into alone, and what it is added to when that is there before; else the site itself."""
    users = list(site.node.users)
    if len(users) == 1 and is_add(users[0]):
        stream = next((n for n in users[0].all_input_nodes if n is not site.node), None)
        if stream is not None and place[stream] < place[site.node]:
            return users[0], stream
    return site.node, None


def _aim(pairs: Sequence[tuple[Tensor, Tensor]], half: int, site: WeightSite) -> tuple[Aim, int]:
    """Moments over one half of every batch's rows."""
    size, rows = site.columns, site.rows
    h_sum, t_sum = torch.zeros(size, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    second, cross, power, count = torch.zeros(size, size), torch.zeros(rows, size), 0.0, 0
    for x, wanted in pairs:
        h = x.reshape(-1, size).tensor_split(2)[half].float()
        t = wanted.reshape(-1, rows).tensor_split(2)[half].float()
        second.addmm_(h.t(), h)
        cross.addmm_(t.t(), h)
        h_sum, t_sum, power, count = h_sum + h.sum(0), t_sum + t.sum(0), power + float(t.double().square().sum()), count + len(h)
    h_mean, t_mean = h_sum / count, t_sum / count
    if site.kind is SiteKind.MM:  # takes no bias
        h_mean, t_mean = torch.zeros_like(h_mean), torch.zeros_like(t_mean)
    covariance = second.double() / count - torch.outer(h_mean, h_mean)
    return Aim(h_mean, t_mean, covariance, cross.double() / count - torch.outer(t_mean, h_mean), power / count - float(t_mean.square().sum())), count


def _apply(editor: Editor, site: WeightSite, stays: Tensor, folds: Sequence[Aim], rows: Sequence[int]) -> float:
    weight, whole = site.matrix().double(), _pooled(folds, rows)
    ridge = choose_ridge(weight, folds, stays)
    new = refit(weight, whole, stays, ridge)
    if site.kind is not SiteKind.MM:
        editor.set_bias(site, (whole.target - new @ whole.inputs).to(site.dtype), "the mean of the dense stream")
    editor.set_matrix(site, new.to(site.dtype), "removed inputs zeroed, the others aim at the dense stream", {"ridge": ridge})
    return max(0.0, 1 + whole.error(new) / max(whole.power, 1e-300)) ** 0.5


def _pooled(folds: Sequence[Aim], rows: Sequence[int]) -> Aim:
    """Moments of all rows together."""
    shares = [r / sum(rows) for r in rows]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum(0)

    h, t = mean([f.inputs for f in folds]), mean([f.target for f in folds])
    second = mean([f.covariance + torch.outer(f.inputs, f.inputs) for f in folds])
    cross = mean([f.cross + torch.outer(f.target, f.inputs) for f in folds])
    power = sum(s * (f.power + float(f.target.square().sum())) for s, f in zip(shares, folds, strict=True)) - float(t.square().sum())
    return Aim(h, t, second - torch.outer(h, h), cross - torch.outer(t, h), power)


def choose_ridge(weight: Tensor, folds: Sequence[Aim], stays: Tensor) -> float:
    """The ridge whose fit on either half of the rows leaves the smallest error on the other half, from no fit downwards while it falls; in float32."""
    weight = weight.float()
    folds = [Aim(f.inputs.float(), f.target.float(), f.covariance.float(), f.cross.float(), f.power) for f in folds]

    def held_out(ridge: float) -> float:
        return sum(judged.error(refit(weight, fitted, stays, ridge)) for fitted, judged in (folds, folds[::-1]))

    return least_ridge(held_out)


def refit(weight: Tensor, aim: Aim, stays: Tensor, ridge: float) -> Tensor:
    """`[N, K]`: the weight on the columns that stay, moved towards the aim as far as the ridge lets it; zero elsewhere."""
    new = weight * stays
    if ridge == float("inf"):
        return new
    keep = stays.nonzero().flatten()
    factor, broken = torch.linalg.cholesky_ex(damped(aim.covariance, ridge)[keep][:, keep])
    if int(broken):
        return new
    left = aim.cross[:, keep] - new[:, keep] @ aim.covariance[keep][:, keep]
    new[:, keep] += torch.cholesky_solve(left.t(), factor).t()
    return new
