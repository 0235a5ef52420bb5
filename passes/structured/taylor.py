"""First-order Taylor importance: how much the loss would change, to first order, if an index's inputs to its consumers vanished.

Source: Molchanov et al., ICLR 2017 (arXiv 1611.06440), equation 8; for coupled structures Ma et al., "LLM-Pruner" (arXiv 2305.11627), equation 4. The
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ir.program import Program
from ..context import Context
from .groups import Group
from .loss import differentiable_losses


def taylor_scores(program: Program, groups: Sequence[Group], ctx: Context) -> dict[Group, Tensor]:
    """Per group `[size] f32`: `|sum W dL/dW|` over the consumers' columns of every index, summed over batches."""
    names = sorted({c.site.tensors[0] for g in groups for c in g.consumers})
    scores = {g: torch.zeros(g.size) for g in groups}
    for loss, weights, _ in differentiable_losses(program, names, (), ctx, "scoring (taylor)"):
        slopes = dict(zip(names, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
        for group in groups:
            scores[group] += _change(group, weights, slopes).abs()
    return scores


def _change(group: Group, weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor | None]) -> Tensor:
    total = torch.zeros(group.size)
    for consumer in group.consumers:
        slope = slopes[consumer.site.tensors[0]]
        if slope is not None:
            product = consumer.site.to_matrix((weights[consumer.site.tensors[0]].detach() * slope).float())
            total += consumer.per_index(group.axis, product.sum(0))
    return total
