"""Caches of keys and values in 8 bits: a quarter of the bytes of float32, half of those of float16, for every token that is held.

One symmetric scale for each channel of each head, from the largest value in the calibration data: keys have channels that are large for every token (KIVI,
arXiv 2402.02750), which scales for whole tensors or tokens would not fit. Keys are quantized after their rotary turn, as ONNX Runtime holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..ir.edit import Editor
from ..ir.errors import PassError
from ..ir.int8_caches import LIMIT, GrownCache, grown_caches, quantize_caches
from ..ir.program import Program
from ..ir.shapes import ensure_values
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .tapped import Tapped

WHY = "8 bits, a scale for every channel"


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Every cache of a program of `fxpress.capture_causal_lm` becomes int8; `only` and `skip` match the names of cache inputs, such as `*_0_key`."""

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for each cache; `PassError` for programs without any."""
        if not program.inputs.caches:
            raise PassError(f"{self.name}: the program has no caches; capture the model with fxpress.capture_causal_lm")
        ensure_values(program)
        grown = {c.past: c for c in grown_caches(program)}
        decisions, skips = [], []
        for past in [n for n in program.graph.nodes if n in program.cache_nodes]:
            why = self.why_unnamed(past.name) or _why_not(grown.get(past))
            if why is None:
                decisions.append(_decision(past))
            else:
                skips.append(Skip(past.name, why))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=tuple(skips))

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Scales of 1."""
        with Editor(program, self.to_spec()) as editor:
            quantize_caches(editor, {c.past: torch.ones(_sizes(c.past)) for c in _planned(program, plan)}, WHY)

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Find the largest value of every channel, and quantize."""
        caches = _planned(program, plan)
        runner, largest = Tapped(program, [c.new.name for c in caches]), [torch.zeros(_sizes(c.past)) for c in caches]
        for call in ctx.track(ctx.calibration, self.name):
            with torch.no_grad():
                largest = [torch.maximum(old, _largest(new)) for old, new in zip(largest, runner(call).hidden, strict=True)]
        scales = {c.past: torch.where(top > 0, top / LIMIT, 1.0) for c, top in zip(caches, largest, strict=True)}
        with Editor(program, self.to_spec()) as editor:
            quantize_caches(editor, scales, WHY)
        return plan.carried_out()

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """What a token takes."""
        before, after = (sum(r.facts[f"token_bytes_{when}"] for r in results) for when in ("before", "after"))
        return (f"{len(results)} caches hold {after:,.0f} bytes a token, {before:,.0f} before",)


def _planned(program: Program, plan: Plan) -> list[GrownCache]:
    wanted = {d.site for d in plan.decisions}
    return [c for c in grown_caches(program) if c.past.name in wanted]


def _why_not(cache: GrownCache | None) -> str | None:
    if cache is None:
        return "new tokens are not simply put behind it"
    return "it is in 8 bits already" if cache.scale is not None else None


def _decision(past: fx.Node) -> Decision:
    sizes = _sizes(past)
    width = past.meta["val"].dtype.itemsize
    facts = {"token_bytes_before": float(prod(sizes) * width), "token_bytes_after": float(prod(sizes))}
    return Decision(site=past.name, action="int8", bytes_before=0, bytes_after=prod(sizes) * width, facts=facts)


def _sizes(past: fx.Node) -> tuple[int, int]:
    shape = past.meta["val"].shape
    return int(shape[1]), int(shape[3])


def _largest(new: Tensor) -> Tensor:
    """`[B, G, S, D] -> [G, D]`."""
    return new.float().abs().amax((0, 2)).cpu()
