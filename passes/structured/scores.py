"""Importance of every index of a group; what is least important goes first.

Let `W [N, K]` be a site that consumes the class, `x` its inputs, `S_j` the columns of index `j`:

- `l1`, `l2`: norm of all weights of the index, everywhere it occurs (group magnitude; Fang et al., arXiv 2301.12900, section 3.3).
- `wanda`: `sum_{k in S_j} ||x_k||_2 sum_n |W_nk|` (Sun et al., arXiv 2306.11695, equation 1, summed over a structure).
- `flap`: `sum_{k in S_j} Var(x_k) sum_n W_nk^2` (An et al., arXiv 2312.11983, equation 5); its bias compensation puts the mean back.
- `taylor`: `|sum_{k in S_j, n} W_nk dL/dW_nk|`, summed over batches (Molchanov et al., arXiv 1611.06440; Ma et al., arXiv 2305.11627).
- `obs`: rise of `||W x - W' x||^2` when the index goes and the best `W'` on the remaining columns takes over (see `obs`), as a share of `||W x||^2`.
- `obs_fisher`: the same error with every output weighted by the mean square of its gradient, which estimates the rise of the loss (see `sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor

from ...ir.atoms import leaves
from ...ir.axes import labels
from ...ir.errors import CalibrationError
from ...ir.nodes import get_tensor
from ...ir.program import Program
from ..base import Need
from ..calibrate import CalibrationWalk, Statistics, site_groups, why_not_observable
from ..context import Context
from .groups import Consumer, Group
from .obs import obs_scores
from .sensitivity import output_sensitivity

Scores = dict[Group, Tensor]


class Importance(Enum):
    """How an index is scored."""

    L1 = "l1"
    L2 = "l2"
    WANDA = "wanda"
    FLAP = "flap"
    TAYLOR = "taylor"
    OBS = "obs"
    OBS_FISHER = "obs_fisher"

    @property
    def needs_data(self) -> bool:
        """Whether calibration batches are needed."""
        return self not in (Importance.L1, Importance.L2)


def score_groups(program: Program, groups: Sequence[Group], importance: Importance, ctx: Context) -> Scores:
    """Scores `[size] f32 >= 0` of every group. A group that no observable site consumes is scored by `l2`."""
    if importance.needs_data and not ctx.calibration and not (ctx.training and importance is Importance.TAYLOR):
        raise CalibrationError(f"importance {importance.value} needs calibration data; pass calibration=[batch, ...], or take importance=l2, which needs none")
    if importance is Importance.TAYLOR:
        from .taylor import taylor_scores

        return taylor_scores(program, groups, ctx)
    observed = [g for g in groups if importance.needs_data and observable(g)]
    scores = _from_inputs(program, observed, importance, ctx) if observed else {}
    order = 1 if importance is Importance.L1 else 2
    return scores | {g: _magnitude(program, g, order) for g in groups if g not in scores}


def observable(group: Group) -> list[Consumer]:
    """The consumers whose inputs can be watched."""
    return [c for c in group.consumers if why_not_observable(c.site) is None]


def comparable(scores: Scores, importance: Importance) -> Scores:
    """Scores that can be ranked across groups: `obs` and `taylor` are losses already, the others become shares of their group."""
    if importance in (Importance.OBS, Importance.OBS_FISHER, Importance.TAYLOR):
        return scores
    return {g: s / s.sum().clamp_min(1e-30) for g, s in scores.items()}


def _magnitude(program: Program, group: Group, order: int) -> Tensor:
    """Norm of every weight of an index; batch-norm statistics are no weights."""
    total = torch.zeros(group.size)
    parameters = dict(program.graph_module.named_parameters(remove_duplicate=False))
    for occurrence in group.axis.occurrences:
        tensor = get_tensor(program.graph_module, occurrence.tensor).detach()
        if occurrence.tensor in parameters:
            owner = labels(group.analysis.tensors[occurrence.tensor][occurrence.dim], group.axis.atom)
            weight = tensor.float().abs().pow(order).movedim(occurrence.dim, 0).reshape(len(owner), -1).sum(1)
            total.index_add_(0, owner[owner >= 0], weight[owner >= 0])
    return total.pow(1 / order)


def _from_inputs(program: Program, groups: Sequence[Group], importance: Importance, ctx: Context) -> Scores:
    need = {Importance.WANDA: Need.MEAN_SQUARE, Importance.FLAP: Need.MEAN | Need.MEAN_SQUARE}.get(importance, Need.GRAM)
    sensitivity: dict[str, Tensor] = {}
    if importance is Importance.OBS_FISHER:
        sensitivity = output_sensitivity(program, list({c.site.name: c.site for g in groups for c in observable(g)}.values()), ctx)
    scores = {g: torch.zeros(g.size) for g in groups}
    for consumer, mine, (statistics,) in watch(program, groups, need, ctx, f"scoring ({importance.value})"):
        if need is Need.GRAM:
            for group, score in obs_scores(consumer, mine, statistics, sensitivity.get(consumer.site.name)).items():
                scores[group] += score
        else:
            for group in mine:
                scores[group] += consumer.per_index(group.axis, _COLUMNS[importance](consumer, statistics))
    return scores


Watched = tuple[Consumer, list[Group], list[Statistics]]


def watch(program: Program, groups: Sequence[Group], need: Need, ctx: Context, label: str, folds: int = 1) -> Iterator[Watched]:
    """Walk the calibration data once: every observable consumer of the groups, in graph order, with the groups it consumes and its inputs' statistics."""
    inputs = {c.site.name: c for g in groups for c in observable(g)}
    walk = CalibrationWalk(program, ctx.calibration)
    for sites in ctx.track(site_groups([s for s in program.sites() if s.name in inputs]), label):
        statistics = walk.folds(sites, need, folds)
        for consumer in (inputs[s.name] for s in sites):
            held = set(leaves(consumer.axis))
            yield consumer, [g for g in groups if g.axis.atom in held], statistics


def _wanda(consumer: Consumer, statistics: Statistics) -> Tensor:
    assert statistics.mean_square is not None
    matrix, groups = consumer.site.matrix().float().abs(), consumer.site.groups
    norms = (statistics.mean_square * statistics.tokens).sqrt()
    return (matrix.unflatten(0, (groups, -1)).sum(1) * norms).sum(0)


def fluctuation(consumer: Consumer, statistics: Statistics) -> Tensor:
    """Per column of the consumer `Var(x_k) sum_n W_nk^2`, `[K]` (FLAP)."""
    assert statistics.mean_square is not None and statistics.mean is not None
    matrix, groups = consumer.site.matrix().float().square(), consumer.site.groups
    variance = (statistics.mean_square - statistics.mean.square()).clamp_min(0)
    return (matrix.unflatten(0, (groups, -1)).sum(1) * variance).sum(0)


_COLUMNS: dict[Importance, Callable[[Consumer, Statistics], Tensor]] = {Importance.WANDA: _wanda, Importance.FLAP: fluctuation}
