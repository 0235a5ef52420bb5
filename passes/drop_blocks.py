"""Remove whole residual blocks, those that change their stream least first.

Block influence `1 - E[cos(x_in, x_out)]` over tokens (Men et al., "ShortGPT", arXiv 2403.03853, equation 1). A layer is all residual blocks of one
depth (attention and feed-forward network); `granularity=block` drops them one by one (Zhong et al., "BlockPruner", arXiv 2406.10594). Blocks are found by
structure: an addition whose one operand is the stream. Blocks with a projection shortcut change the stream's shape and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import CalibrationError, PassError
from ..ir.program import Program
from ..ir.spec import option
from ..ir.structure import Block, find_structure
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .memory import remembered
from .tapped import Tapped


class Granularity(Enum):
    """What is dropped as one."""

    LAYER = "layer"
    BLOCK = "block"


@dataclass(frozen=True)
class _Unit:
    """Blocks that go together: `source` is the stream before them, `end` after them."""

    name: str
    blocks: tuple[Block, ...]
    parameters: int

    @property
    def source(self) -> str:
        return self.blocks[0].stream.name

    @property
    def end(self) -> str:
        return self.blocks[-1].node.name

    @property
    def why_not(self) -> str | None:
        return next((f"{b}: {b.why_not}" for b in self.blocks if not b.droppable), None)


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Drops the `count` layers (or blocks) of least influence on the calibration data. Layers are called `layer 3`, blocks `layer 3 block 0`."""

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True
    count: int = option(ge=1)
    granularity: Granularity = Granularity.LAYER

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """A decision for every unit to drop, a skip for every other."""
        units = self._units(program)
        skips = [Skip(u.name, why) for u in units if (why := self.why_unnamed(u.name) or u.why_not) is not None]
        free = [u for u in units if u.name not in {s.site for s in skips}]
        if self.count >= len(units) or self.count > len(free):
            raise PassError(
                f"{self.to_spec()}: the model has {len(units)} residual {self.granularity.value}s, {len(free)} of which can go and at least one must stay"
                + "".join(f"; {s.site}: {s.why}" for s in skips[:3])
            )
        influence = self._influence(program, free, ctx)
        gone = sorted(free, key=lambda u: influence[u.name])[: self.count]
        skips += [Skip(u.name, f"influence {influence[u.name]:.4f}") for u in free if u not in gone]
        decisions = tuple(_decision(u, influence[u.name]) for u in free if u in gone)
        return Plan(pass_spec=self.to_spec(), decisions=decisions, skips=tuple(skips))

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Let the users of each dropped addition read its stream."""
        chosen = {d.site for d in plan.decisions}
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        going = [(b, u.name) for u in self._units(program) if u.name in chosen for b in u.blocks]
        with Editor(program, self.to_spec()) as editor:
            for block, name in sorted(going, key=lambda g: -order[g[0].node]):  # later ones first: their stream may be an earlier one's node
                editor.drop_branch(block.node, block.stream, f"dropped: {name}")
        return plan.carried_out()

    def _units(self, program: Program) -> list[_Unit]:
        if self.granularity is Granularity.BLOCK:
            return [_unit(f"layer {b.layer} block {i}", (b,)) for layer in find_structure(program).layers for i, b in enumerate(layer)]
        return list(_layers(program).values())

    def _influence(self, program: Program, units: Sequence[_Unit], ctx: Context) -> dict[str, float]:
        return _remembered(program, units, ctx)


def layer_influence(program: Program, ctx: Context) -> dict[int, float]:
    """Block influence of every residual layer by its number, made once a run."""
    layers = _layers(program)
    found = _remembered(program, list(layers.values()), ctx) if layers else {}
    return {number: found[unit.name] for number, unit in layers.items()}


def _layers(program: Program) -> dict[int, _Unit]:
    return {layer[0].layer: _unit(f"layer {layer[0].layer}", layer) for layer in find_structure(program).layers if layer}


def _remembered(program: Program, units: Sequence[_Unit], ctx: Context) -> dict[str, float]:
    def compute() -> dict[str, Tensor]:
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in influences(program, units, ctx).items()}

    found = remembered(ctx, "influence", [u.name for u in units], program, compute)
    return {name: float(value) for name, value in found.items()}


def influences(program: Program, units: Sequence[_Unit], ctx: Context) -> dict[str, float]:
    """Block influence of every unit by name, from 0 (does nothing) to 2."""
    if not ctx.calibration:
        raise CalibrationError("block influence needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
    names = list(dict.fromkeys(n for u in units for n in (u.source, u.end)))
    runner, total, count = Tapped(program, names), {u.name: 0.0 for u in units}, dict.fromkeys((u.name for u in units), 0)
    with torch.no_grad():
        for call in ctx.track(ctx.calibration, "block influence"):
            values = dict(zip(names, runner(call).hidden, strict=True))
            for unit in units:
                change = 1 - _cosine(values[unit.source], values[unit.end])
                total[unit.name] += float(change.sum())
                count[unit.name] += change.numel()
    return {name: total[name] / count[name] for name in total}


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """Per position, `[positions]`; channels are the last axis of tokens `[.., C]` (batch and time may be one axis), axis 1 of images `[B, C, H, W]`."""
    one, other = ((x.movedim(1, -1) if x.dim() == 4 else x).float().flatten(0, -2) for x in (before, after))
    return F.cosine_similarity(one, other, dim=-1)


def _unit(name: str, blocks: tuple[Block, ...]) -> _Unit:
    sites = {s.name: s for b in blocks for s in b.sites}
    return _Unit(name, blocks, sum(s.parameters for s in sites.values()))


def _decision(unit: _Unit, influence: float) -> Decision:
    return Decision(site=unit.name, action=f"drop ({unit.blocks[0].path})", bytes_before=4 * unit.parameters, bytes_after=0, facts={"influence": influence})
