"""How much the loss minds errors in a weight: from gradients at the outputs of its site, in the two forms that quantizers use.

Diagonal Fisher information, `F_nk = sum over samples of (dL/dW_nk)^2`: Kim et al., "SqueezeLLM" (arXiv 2306.07629), equations 5 and 6, with float32 sums.
Guided positions, `s_t = mean over output channels of (dL/dy_tn)^2`: weighting the rows of the input Gram with them turns a layer's output error into an
estimate of the loss; Kim et al., "GuidedQuant" (arXiv 2505.07004), equation 6. Both are of the model as it enters the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ir.errors import CalibrationError
from ..ir.program import Program
from ..ir.sites import CONVOLUTIONS, WeightSite
from .base import Guidance, Need
from .calibrate import CalibrationWalk, Statistics, site_rows
from .context import Context
from .gradients import Gradients
from .memory import Memory, Tensors, remembered

BLOCK_BYTES = 2**30  # Fisher sums held at once; more sites are done in several sweeps


class Sensitivities:
    """What one stage asks about its `sites`, of the model as it stands now; gradients are taken when first needed."""

    def __init__(self, program: Program, sites: Sequence[WeightSite], needs: Need, guidance: Guidance, ctx: Context) -> None:
        self._needs, self._guidance, self._ctx = needs, guidance, ctx
        if not needs & (Need.GUIDED | Need.FISHER):
            return
        self._program = program.clone()
        names = {s.name for s in sites}
        self._sites = [s for s in self._program.sites() if s.name in names]
        self._fisher: Tensors = {}

    def complete(self, statistics: Statistics, walk: CalibrationWalk, sites: Sequence[WeightSite]) -> None:
        """Add the guided Grams and Fisher information of `sites`, which the walk stands before, to their `statistics`.

        A site whose output does not reach the loss gets the plain Gram, and equal Fisher weights.
        """
        if Need.GUIDED in self._needs:
            positions = guided_positions(self._program, self._sites, self._ctx, self._guidance.groups)
            for site in sites:
                known = positions.get(site.name)
                known = known if known is not None and bool(known.any()) else torch.ones(len(row_parts(site, self._guidance.groups)), statistics.tokens)
                statistics.guided[site.name] = walk.guided(site, known.pow(self._guidance.power))
        if Need.FISHER in self._needs:
            for site in sites:
                statistics.fisher[site.name] = self._fisher_of(site.name)

    def _fisher_of(self, name: str) -> Tensor:
        """From the block of sites in memory, or after a sweep for the block that holds the site."""
        if name not in self._fisher:
            block = next(b for b in fisher_blocks(self._sites) if name in {s.name for s in b})
            self._fisher.clear()
            self._fisher.update(diagonal_fisher(self._program, block, self._ctx))
            self._fisher.update({s.name: torch.ones(s.rows, s.columns) for s in block if s.name not in self._fisher})
        return self._fisher[name]


def row_parts(site: WeightSite, groups: int) -> list[range]:
    """The output channels of the site in parts that share a guided Gram: `groups` (but no more than there are channels) in each conv group."""
    channels = site.rows // site.groups
    inner = torch.arange(channels).tensor_split(min(groups, channels))
    return [range(g * channels + int(p[0]), g * channels + int(p[-1]) + 1) for g in range(site.groups) for p in inner]


def row_weights(site: WeightSite, diagonals: Tensor) -> Tensor:
    """Weights of the squared errors, `[N, K]`, from the diagonals `[P, K]` of the Grams of P parts of the rows (see `row_parts`)."""
    sizes = [len(p) for p in row_parts(site, len(diagonals) // site.groups)]
    return diagonals.repeat_interleave(torch.tensor(sizes), 0)


def guided_positions(program: Program, sites: Sequence[WeightSite], ctx: Context, groups: int = 1) -> Tensors:
    """Per site `[P, T] f32`: the weight of every row that the site sees over the calibration calls, for P parts of its output channels.

    P and the parts are those of `row_parts`. One sweep of gradients; remembered over the run and in its checkpoint folder.
    """

    def compute() -> Tensors:
        parts: dict[str, list[Tensor]] = {s.name: [] for s in sites}

        def visit(site: WeightSite, _: Tensor, slope: Tensor) -> None:
            rows = slope_rows(site, slope)  # [samples, positions, N]
            square = rows.float().square().mul_(len(rows) ** 2).flatten(0, 1)
            parts[site.name].append(torch.stack([square[:, p.start : p.stop].mean(1) for p in row_parts(site, groups)]))

        Gradients(program, sites, ctx).visit(visit, "output gradients")
        return {name: _finite(torch.cat(found, 1), name) for name, found in parts.items() if found}

    return remembered(ctx, f"guided-{groups}", [s.name for s in sites], program, compute)


def diagonal_fisher(program: Program, sites: Sequence[WeightSite], ctx: Context) -> Tensors:
    """Per site `[N, K] f32`; one sweep of gradients, remembered in the run's checkpoint folder. See `fisher_blocks` for the memory it takes."""

    def compute() -> Tensors:
        total: Tensors = {}

        def visit(site: WeightSite, x: Tensor, slope: Tensor) -> None:
            if site.name not in total:
                total[site.name] = torch.zeros(site.rows, site.columns)
            _add_fisher(total[site.name], site, x, slope)

        Gradients(program, sites, ctx).visit(visit, "gradients")
        return {name: _finite(sums, name) for name, sums in total.items()}

    return remembered(replace(ctx, memory=Memory()), "fisher", [s.name for s in sites], program, compute)


def fisher_blocks(sites: Sequence[WeightSite]) -> list[list[WeightSite]]:
    """Consecutive sites whose Fisher sums fit into `BLOCK_BYTES` together (a larger site is a block of its own)."""
    blocks: list[list[WeightSite]] = []
    room = 0
    for site in sites:
        need = 4 * site.parameters
        if not blocks or need > room:
            blocks.append([])
            room = BLOCK_BYTES
        blocks[-1].append(site)
        room -= need
    return blocks


def slope_rows(site: WeightSite, slope: Tensor) -> Tensor:
    """A gradient at the site's output as `[samples, positions, N]`; the first axis of the output tells samples apart."""
    if site.kind in CONVOLUTIONS:
        return slope.movedim(1, -1).flatten(1, -2)
    return slope.unsqueeze(1) if slope.dim() == 2 else slope.flatten(1, -2)


def _add_fisher(total: Tensor, site: WeightSite, x: Tensor, slope: Tensor) -> None:
    """Add every sample's squared gradient of `weight: [N, K]`; a sample's loss is its own mean, whatever the batch."""
    rows = slope_rows(site, slope).float() * len(slope)
    if rows.shape[1] == 1 and site.kind not in CONVOLUTIONS:  # one position a sample: squares of products are products of squares
        total.addmm_(rows[:, 0].square().t(), x.reshape(-1, x.shape[-1]).float().square())
        return
    channels = site.rows // site.groups
    for i, sample in enumerate(rows):
        seen = torch.cat(list(site_rows(site, x[i : i + 1])), 1).float()  # [groups, positions, K]
        for group in range(site.groups):
            part = slice(group * channels, (group + 1) * channels)
            total[part] += (sample[:, part].t() @ seen[group]).square_()


def _finite(found: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(found).all()):
        raise CalibrationError(f"{name}: squared gradients are not finite; the loss overflows on the calibration data: check the batches or use fp32 weights")
    return found
