"""How much the loss minds an error at the outputs of a site: mean squared output gradients, the diagonal Fisher information of its outputs.

With them the output error of a layer becomes an estimate of the rise of the loss, which can be compared between layers
(the weighting of Kim et al., "GuidedQuant", arXiv 2505.07004, equation 5, here with one weight an output channel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.program import Program
from ...ir.sites import WeightSite
from ..context import Context
from ..sensitivities import slope_rows
from .loss import differentiable_losses


def output_sensitivity(program: Program, sites: Sequence[WeightSite], ctx: Context) -> dict[str, Tensor]:
    """Per site `[N] f32`: `E[(dL/dy_n)^2]` over positions, `L` the summed loss of a batch."""
    total = {s.name: torch.zeros(s.rows) for s in sites}
    count = dict.fromkeys(total, 0)
    tensors, taps = [s.tensors[0] for s in sites], [s.node.name for s in sites]
    for loss, _, outputs in differentiable_losses(program, tensors, taps, ctx, "output sensitivity"):
        slopes = torch.autograd.grad(loss, list(outputs), allow_unused=True)
        for site, slope in zip(sites, slopes, strict=True):
            if slope is not None:
                rows = slope_rows(site, slope).flatten(0, 1).float()
                total[site.name] += rows.square().sum(0)
                count[site.name] += len(rows)
    return {name: total[name] / max(1, count[name]) for name in total}
