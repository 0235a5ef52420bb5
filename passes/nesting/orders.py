"""In which order the units of a layer (hidden units, heads, key-value groups) are worth keeping, so that every prefix is a good smaller layer.

Let h be the inputs of the site `W: [N, K]` that sums over the units, C their second moment, `S_i` the columns of unit i, W_i those of the weight.

- `activation`: `sum_{k in S_i} E|h_k|` (Nemotron Elastic, arXiv 2511.16664, equation 2, which scores the first linear's outputs).
- `wanda`: `sum_{k in S_i} E[h_k^2]^(1/2) |W_k|`.
- `fluctuation`: `sum_{k in S_i} Var(h_k) |W_k|^2` (FLAP, arXiv 2312.11983).
- `leverage`: `sum_{k in S_i} [C (C + l I)^-1]_kk` (UniQL, arXiv 2512.03383, after MoDeGPT, arXiv 2408.09632).
- `fisher`: `E[(sum_{k in S_i} h_k dL/dh_k)^2]` (of DynamicMatFormer: squared first-order changes of the loss).
- `elimination` (ours): units go one after another, always the one that leaves the least output error. With `G_ij = <W_i h_i, W_j h_j>` the error of leaving
  out the set P is exactly `sum_{i, j in P} G_ij`, so the next to go is `argmin_i G_ii + 2 sum_{j in P} G_ij`.
- `loss` (ours): the same with every output weighted by its mean squared gradient, an estimate of the rise of the loss.

Of centred inputs (`h - E[h]`) C is the covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from ...ir.program import Program
from ...ir.sites import WeightSite
from ..base import Need
from ..calibrate import Statistics
from ..context import Context
from ..gradients import Gradients
from ..modular import ridge_leverage
from ..sensitivities import slope_rows
from ..structured.groups import Consumer, Group
from ..structured.scores import fluctuation, observable, watch
from ..structured.sensitivity import output_sensitivity


class NestImportance(Enum):
    """What puts a unit in front."""

    ACTIVATION = "activation"
    WANDA = "wanda"
    FLUCTUATION = "fluctuation"
    LEVERAGE = "leverage"
    FISHER = "fisher"
    ELIMINATION = "elimination"
    LOSS = "loss"

    @property
    def need(self) -> Need:
        """What of a layer's inputs it looks at, beside their mean."""
        by_column = {NestImportance.ACTIVATION: Need.MEAN_ABS, NestImportance.WANDA: Need.MEAN_SQUARE, NestImportance.FLUCTUATION: Need.MEAN_SQUARE}
        return Need.NONE if self is NestImportance.FISHER else by_column.get(self, Need.GRAM)


def unit_orders(
    program: Program, groups: Sequence[Group], importance: NestImportance, ctx: Context, *, centred: bool
) -> tuple[dict[Group, Tensor], dict[str, Tensor]]:
    """Per group the order `[size] int64`, the most important unit first, and per consumer's name the mean `[K] f32` of its inputs."""
    sites = list({c.site.name: c.site for g in groups for c in observable(g)}.values())
    weights = output_sensitivity(program, sites, ctx) if importance is NestImportance.LOSS else {}
    changes = _loss_changes(program, groups, ctx) if importance is NestImportance.FISHER else {}
    waiting = {g: len(observable(g)) for g in groups}
    found: dict[Group, Tensor] = {}
    orders: dict[Group, Tensor] = {}
    means: dict[str, Tensor] = {}
    for consumer, mine, (statistics,) in watch(program, groups, Need.MEAN | importance.need, ctx, f"ordering ({importance.value})"):
        assert statistics.mean is not None
        means[consumer.site.name] = statistics.mean[0]
        for group in mine:
            value = changes[group] if group in changes else _value(consumer, group, statistics, importance, weights.get(consumer.site.name), centred)
            found[group] = found[group] + value if group in found else value
            waiting[group] -= 1
            if waiting[group] == 0:
                orders[group] = _order(found.pop(group))
    return orders, means


def _order(value: Tensor) -> Tensor:
    """Scores `[size]` from the highest down; of interactions `[size, size]` the units in the reverse of the order in which they go."""
    return value.argsort(descending=True, stable=True) if value.dim() == 1 else elimination(value).flip(0)


def elimination(interactions: Tensor) -> Tensor:
    """Units in the order in which they go, always the one whose going leaves the smallest `sum_{i, j gone} G_ij`; `[size, size]` to `[size] int64`."""
    rise = interactions.diagonal().double().clone()
    doubled = 2 * interactions.double()
    gone: list[int] = []
    for _ in range(len(rise)):
        unit = int(rise.argmin())
        gone.append(unit)
        rise += doubled[:, unit]
        rise[unit] = torch.inf
    return torch.tensor(gone, dtype=torch.int64)


def _value(consumer: Consumer, group: Group, statistics: Statistics, importance: NestImportance, weights: Tensor | None, centred: bool) -> Tensor:
    """Scores `[size]` of the group's units at this consumer, or their interactions `[size, size]`."""
    if importance in (NestImportance.ELIMINATION, NestImportance.LOSS):
        return _summed(consumer, group, _interactions(consumer, statistics, weights, centred))
    return consumer.per_index(group.axis, _columns(consumer, statistics, importance))


def _columns(consumer: Consumer, statistics: Statistics, importance: NestImportance) -> Tensor:
    """Scores of single columns, `[K]`."""
    if importance is NestImportance.FLUCTUATION:
        return fluctuation(consumer, statistics)
    if importance is NestImportance.ACTIVATION:
        assert statistics.mean_abs is not None
        return statistics.mean_abs[0]
    if importance is NestImportance.WANDA:
        assert statistics.mean_square is not None
        return statistics.mean_square[0].sqrt() * consumer.site.matrix().float().norm(dim=0)
    assert statistics.gram is not None
    return ridge_leverage(statistics.gram[0])


def _interactions(consumer: Consumer, statistics: Statistics, weights: Tensor | None, centred: bool) -> Tensor:
    """`<W_i h_i, W_j h_j>` of single columns, `[K, K]`, the outputs weighted by `weights [N]`."""
    assert statistics.gram is not None and statistics.mean is not None
    second, mean, matrix = statistics.gram[0].float(), statistics.mean[0].float(), consumer.site.matrix().float()
    matrix = matrix if weights is None else matrix * weights.sqrt().unsqueeze(1)
    return (second - torch.outer(mean, mean) if centred else second) * (matrix.t() @ matrix)


def _summed(consumer: Consumer, group: Group, columns: Tensor) -> Tensor:
    """`[K, K]` summed over the columns of every pair of units, `[size, size]`."""
    owner = consumer.columns(group.axis)
    mine = owner >= 0
    rows = torch.zeros(group.size, len(owner)).index_add_(0, owner[mine], columns[mine])
    return torch.zeros(group.size, group.size).index_add_(0, owner[mine], rows[:, mine].t())


def _loss_changes(program: Program, groups: Sequence[Group], ctx: Context) -> dict[Group, Tensor]:
    """Per group `[size] f32`: the mean square, over positions, of the first-order change of the loss if a unit vanished there."""
    consumers = {c.site.name: (c, [g for g in groups if c in g.consumers]) for g in groups for c in observable(g)}
    total = {g: torch.zeros(g.size) for g in groups}

    def visit(site: WeightSite, x: Tensor, slope: Tensor) -> None:
        consumer, mine = consumers[site.name]
        rows = slope_rows(consumer.site, slope).flatten(0, 1).float() @ consumer.site.matrix().float()
        change = rows * x.detach().reshape(-1, x.shape[-1]).float()
        for group in mine:
            owner = consumer.columns(group.axis)
            held = torch.zeros(len(change), group.size).index_add_(1, owner[owner >= 0], change[:, owner >= 0])
            total[group] += held.square().sum(0)

    Gradients(program, [c.site for c, _ in consumers.values()], ctx).visit(visit, "changes of the loss")
    return total
