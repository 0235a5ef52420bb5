"""Mixed precision: how many bits each site gets, so that the loss rises least within a budget of bytes; the quantizers after it follow.

Every site's rise of the loss at every width is estimated (`bit_curves`), the best choice within the budget is found exactly (`knapsack`), and, with
`swaps`, the closest alternatives are tried by the true loss on calibration data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.errors import PassError, SpecError
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip, parse_pass
from .bit_curves import bit_curves, rounded
from .context import Context
from .examples import Example
from .knapsack import choose
from .losses import Criterion
from .quantizing import PLANNED_BITS, Quantization
from .sensitivities import row_weights
from .structured.loss import example_loss, task_criterion
from .tapped import Tapped

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class AllocateBits(Pass):
    """Plans a width from `widths` for every site that `quantizer`, a pass spec whose `bits=` is left out, can take. Needs calibration data.

    `budget` is for the weights of these sites with scales, tables and padding counted: bits a weight (`3.5`, `3.5bits`) or bytes (`40MB`, `40MiB`).
    `swaps` tries so many exchanges of widths between two sites by the true loss, those of least estimated loss first, and keeps what helps.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    uses_data: ClassVar[bool] = True
    budget: float | str = option()
    widths: tuple[int, ...] = (2, 3, 4, 8)
    quantizer: str = "quantize_lut"
    swaps: int = option(0, ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _budget_bytes(self.budget, 8)
        follower = parse_pass(self.quantizer)
        if not isinstance(follower, Quantization) or follower.bits is not None:
            raise SpecError(f"allocate_bits: quantizer={self.quantizer!r} must be a quantizer without bits=, for example quantize_gptq{{group_size=64}}")
        if not self.widths or min(self.widths) < 1 or max(self.widths) > 8 or len(set(self.widths)) < len(self.widths):
            raise SpecError(f"allocate_bits: widths={list(self.widths)} must be different numbers from 1 to 8")

    @property
    def follower(self) -> Quantization:
        """The quantizer that is planned for."""
        found = parse_pass(self.quantizer)
        assert isinstance(found, Quantization)
        return found

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """Estimate, choose, and perhaps try swaps."""
        sites, skips = self._sites(program)
        if not sites:
            return Plan(pass_spec=self.to_spec(), decisions=(), skips=skips)
        curves, diagonals = bit_curves(program, sites, self.follower, self.widths, ctx)
        sizes = [[self.follower.format_of(s, b).nbytes(s.rows, s.columns, s.dtype) for b in self.widths] for s in sites]
        budget = _budget_bytes(self.budget, sum(s.parameters for s in sites))
        picked = choose([curves[s.name].tolist() for s in sites], sizes, budget)
        if self.swaps:
            swaps = _Swaps(
                program=program,
                runner=Tapped(program),
                criterion=task_criterion(program, ctx),
                sites=sites,
                curves=curves,
                diagonals=diagonals,
                sizes=sizes,
                budget=budget,
                one=self,
                ctx=ctx,
            )
            picked = swaps.improve(picked)
        decisions = [self._decision(s, p, curves[s.name], z) for s, p, z in zip(sites, picked, sizes, strict=True)]
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=skips)

    def _sites(self, program: Program) -> tuple[list[WeightSite], tuple[Skip, ...]]:
        """Sites the quantizer can take at every width, and why not the others."""
        widest = replace(self.follower, bits=max(self.widths))
        taken, skips = [], []
        for site in program.sites():
            why = self.why_unnamed(site.name) or widest.why_skip(site)
            if why is None:
                taken.append(site)
            else:
                skips.append(Skip(site.name, why))
        return taken, tuple(skips)

    def _decision(self, site: WeightSite, place: int, curve: Tensor, sizes: Sequence[int]) -> Decision:
        facts = {"bits": float(self.widths[place]), "loss_rise": float(curve[place]), "planned_bytes": float(sizes[place])}
        return Decision(site=site.name, action=f"plan {self.widths[place]} bits", bytes_before=site.nbytes, bytes_after=site.nbytes, facts=facts)

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Leave the widths at the sites; no weight changes."""
        decisions = {d.site: d for d in plan.decisions}
        for site in program.sites():
            if site.name in decisions:
                site.node.meta[PLANNED_BITS] = int(decisions[site.name].facts["bits"])
        return plan.carried_out()

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """How many sites got which width, and the bytes planned."""
        counts = {b: sum(r.facts["bits"] == b for r in results) for b in sorted(self.widths)}
        total = sum(r.facts["planned_bytes"] for r in results)
        weights = sum(s.parameters for s in program.sites() if s.name in {r.site for r in results})
        split = ", ".join(f"{n} sites at {b} bits" for b, n in counts.items() if n)
        return (f"{split}; {total:,.0f} bytes, {8 * total / max(1, weights):.3f} bits a weight, if {self.quantizer} follows",)


def _budget_bytes(budget: float | str, parameters: int) -> int:
    """The budget in bytes for so many weights."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", str(budget).strip().lower())
    unit = found[2] if found else ""
    if found is None or not (unit in UNITS or unit in ("bit", "bits")) or float(found[1]) <= 0:
        raise SpecError(f"allocate_bits: budget={budget!r}: expected bits a weight such as 3.5 or 3.5bits, or bytes such as 40MB")
    number = float(found[1])
    bits = unit.startswith("bit") or (not unit and number <= 64)
    return int(number * parameters / 8) if bits else int(number * UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class _Swaps:
    """Tries exchanges of width between two sites by the loss of the whole program with rounded weights."""

    program: Program
    runner: Tapped
    criterion: Criterion
    sites: Sequence[WeightSite]
    curves: Mapping[str, Tensor]
    diagonals: Mapping[str, Tensor]
    sizes: Sequence[Sequence[int]]
    budget: int
    one: AllocateBits
    ctx: Context

    def improve(self, picked: list[int]) -> list[int]:
        """The plan after up to `swaps` trials."""
        weights = {s.tensors[0]: self._weight(s, p) for s, p in zip(self.sites, picked, strict=True)}
        best = self._loss(weights)
        for up, down in self.ctx.track(self._candidates(picked)[: self.one.swaps], "trying swaps"):
            trial = self._swapped(picked, up, down)
            if trial is None:
                continue
            changed = {self.sites[i].tensors[0]: self._weight(self.sites[i], trial[i]) for i in (up, down)}
            loss = self._loss(weights | changed)
            if loss < best:
                picked, best, weights = trial, loss, weights | changed
        return picked

    def _candidates(self, picked: list[int]) -> list[tuple[int, int]]:
        """Pairs (site to widen, site to narrow) that fit the budget, by their estimated rise of the loss."""
        found = []
        for up in range(len(picked)):
            for down in range(len(picked)):
                trial = self._swapped(picked, up, down) if up != down else None
                if trial is not None:
                    rise = sum(float(self.curves[self.sites[i].name][trial[i]] - self.curves[self.sites[i].name][picked[i]]) for i in (up, down))
                    found.append((rise, up, down))
        return [(up, down) for _, up, down in sorted(found)]

    def _swapped(self, picked: list[int], up: int, down: int) -> list[int] | None:
        """The plan with one site a width wider and another narrower, or None when there is no such width or no room."""
        order = sorted(range(len(self.one.widths)), key=lambda p: self.one.widths[p])
        trial = list(picked)
        for site, step in ((up, 1), (down, -1)):
            place = order.index(picked[site]) + step
            if not 0 <= place < len(order):
                return None
            trial[site] = order[place]
        return trial if sum(z[p] for z, p in zip(self.sizes, trial, strict=True)) <= self.budget else None

    def _weight(self, site: WeightSite, place: int) -> Tensor:
        fmt = self.one.follower.format_of(site, self.one.widths[place])
        return site.from_matrix(rounded(site.matrix().float(), fmt, row_weights(site, self.diagonals[site.name])).to(site.dtype))

    def _loss(self, weights: Mapping[str, Tensor]) -> float:
        generator, total = self.ctx.generator(), 0.0
        with torch.no_grad():
            for call in self.ctx.calibration:
                example = Example(call)
                total += float(example_loss(self.criterion, self.program, example, self.runner(call, weights), generator))
        if not total < float("inf"):
            raise PassError("allocate_bits: the loss on the calibration data is not finite; use more widths or fewer swaps")
        return total
