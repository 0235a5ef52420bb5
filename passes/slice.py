"""Slice: a smaller model out of a nested one, a prefix of the units of every layer, at one width for all or one for each (Mix'n'Match, arXiv 2310.07707).

Cutting equals masking the units behind the prefix; where `nest` centred a layer's inputs, what the missing units add on average goes into its bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.axes import analyze_axes
from ..ir.centres import centre_of, fold_centre
from ..ir.edit import Editor
from ..ir.errors import PassError, SpecError
from ..ir.program import Program
from ..ir.spec import option
from ..ir.structure import Role, find_structure
from .base import Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .structured.amounts import change, kept_decision
from .structured.groups import Group, cut, find_groups, pinned_skips

HEADS = (Role.HEAD, Role.KV_GROUP)


@dataclass(frozen=True, kw_only=True)
class Slice(Pass):
    """Keeps the first units of every nested feed-forward layer: a `ratio` of each, or `widths`, one for all or one a layer in the order of the graph.

    `heads`: the share of key-value groups (of heads, where every head has its own keys) that stays. Widths by ratio are rounded to a multiple of
    `multiple_of` where it is smaller than the layer; given widths must be one. `unsorted` allows layers that no `nest` has ordered. `only` and `skip` match
    class names such as `layers.0.mlp.up.weight[0]`.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    ratio: float | None = option(None, gt=0.0, le=1.0)
    widths: tuple[int, ...] = ()
    heads: float | None = option(None, gt=0.0, le=1.0)
    multiple_of: int = option(8, ge=1)
    unsorted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.widths:
            raise SpecError(f"{self.name}: give ratio or widths, not both")
        if self.ratio is None and not self.widths and self.heads is None:
            raise SpecError(f"{self.name}: give ratio, widths or heads, for example {self.name}{{ratio=0.75}}")
        if any(w < 1 for w in self.widths):
            raise SpecError(f"{self.name}: a width must be at least 1, got {min(self.widths)}; drop_blocks removes whole layers")
        if (odd := next((w for w in self.widths if w % self.multiple_of), None)) is not None:
            raise SpecError(f"{self.name}: width {odd} is no multiple of multiple_of={self.multiple_of}; quantization groups and kernels want aligned widths")

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for every layer that gets narrower."""
        groups, skips = self._groups(program)
        counts = self._counts([g for g in groups if g.role is Role.FFN], [g for g in groups if g.role is not Role.FFN])
        skips = (*skips, *(Skip(g.name, f"{g.role.value}: keeps all {g.size}") for g, k in counts.items() if k == g.size))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(kept_decision(g, k, "the first ") for g, k in counts.items() if k < g.size), skips=skips)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Cut: nothing here looks at data."""
        cut_prefixes(program, plan, (Role.FFN, *HEADS))

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Cut, and fold the centres of the layers that were cut."""
        before = program.parameters
        cut_prefixes(program, plan, (Role.FFN, *HEADS))
        ctx.remarks.append(f"parameters {change(before, program.parameters)}")
        return plan.carried_out()

    def _groups(self, program: Program) -> tuple[list[Group], tuple[Skip, ...]]:
        structure = find_structure(program, analyze_axes(program, prefixes=True))
        roles = (*((Role.FFN,) if self.ratio is not None or self.widths else ()), *(HEADS if self.heads is not None else ()))
        groups = find_groups(program, structure, roles)
        ordered = nested_sites(program)
        reasons = {g: why for g in groups if (why := self.why_unnamed(g.name)) is not None}
        loose = [g for g in groups if g not in reasons and not any(c.site.name in ordered for c in g.consumers)]
        if loose and not self.unsorted:
            raise PassError(
                f"{self.to_spec()}: the units of {loose[0].name}{f' and {len(loose) - 1} more layers' if len(loose) > 1 else ''} are in no order of "
                "importance, so a prefix of them is an arbitrary choice; put nest{} before, or set unsorted=true"
            )
        return [g for g in groups if g not in reasons], (*pinned_skips(structure, roles), *(Skip(g.name, why) for g, why in reasons.items()))

    def _counts(self, layers: list[Group], heads: list[Group]) -> dict[Group, int]:
        if self.widths and len(self.widths) not in (1, len(layers)):
            raise PassError(f"{self.to_spec()}: expected one width, or one for each of the {len(layers)} feed-forward layers, got {len(self.widths)}")
        widths = self.widths * len(layers) if len(self.widths) == 1 else self.widths
        if wide := next(((g, w) for g, w in zip(layers, widths, strict=False) if w > g.size), None):
            raise PassError(f"{self.to_spec()}: width {wide[1]} is more than the {wide[0].size} units of {wide[0].name}")
        found = dict(zip(layers, widths, strict=True)) if widths else {g: rounded(self.ratio or 1.0, g.size, self.multiple_of) for g in layers}
        by_layer = {g: max(1, round((self.heads or 1.0) * g.size)) for g in heads if g.role is Role.KV_GROUP}
        grouped = {g.layer for g in by_layer}
        return found | by_layer | {g: max(1, round((self.heads or 1.0) * g.size)) for g in heads if g.role is Role.HEAD and g.layer not in grouped}


def rounded(ratio: float, size: int, multiple_of: int) -> int:
    """A share of `size` units as a multiple of `multiple_of`, where that is smaller than the layer."""
    step = multiple_of if size > multiple_of else 1
    return min(size, max(step, round(ratio * size / step) * step))


def cut_prefixes(program: Program, plan: Plan, roles: tuple[Role, ...]) -> None:
    """Cut what the plan names, and fold the centres of the layers that were cut."""
    groups = _cut(program, plan, roles)
    consumers = {c.site.name for g in groups for c in g.consumers}
    with Editor(program, plan.pass_spec) as editor:
        for site in [s for s in program.sites() if s.name in consumers]:
            fold_centre(editor, site, "what the missing units add on average")


def prefix_view(program: Program, one: Slice) -> Program:
    """What `one` makes of a nested program, over views of the same memory: no tensor is copied, and centres stay in the graph."""
    small = program.clone()
    _cut(small, one.analyze(program, Context()), (Role.FFN, *HEADS), views=True)
    return small


def _cut(program: Program, plan: Plan, roles: tuple[Role, ...], *, views: bool = False) -> dict[Group, Tensor]:
    counts = {d.site: int(d.facts["kept"]) for d in plan.decisions}
    structure = find_structure(program, analyze_axes(program, prefixes=True))
    groups = {g: torch.arange(counts[g.name]) for g in find_groups(program, structure, roles) if g.name in counts}
    cut(program, groups, plan.pass_spec, "prefix of a nested layer", prefixes=True, views=views)
    return groups


def nested_sites(program: Program) -> set[str]:
    """Names of the sites whose inputs a `nest` has put in order, by the journal."""
    named = {c.after.module for c in program.journal.changes if c.pass_spec.split("{")[0] == "nest" and c.after is not None}
    return named | {s.name for s in program.sites() if centre_of(s) is not None}
