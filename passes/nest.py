"""Nest: order the hidden units and heads of every layer by importance, so that every prefix of them is a good smaller model; the full model stays what it was.

Source: MatFormer (arXiv 2310.07707) nests feed-forward widths as prefixes and trains them so; ordering the units of a dense model first, and inputs with
their mean taken off (`ir.centres`), which gives every prefix the right bias without storing one, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.centres import centre, why_not_centred
from ..ir.edit import Editor
from ..ir.errors import CalibrationError, PassError
from ..ir.program import Program
from ..ir.sites import SiteKind
from ..ir.structure import Role, find_structure
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .memory import remembered
from .nesting.orders import NestImportance, unit_orders
from .structured.groups import Group, cut, find_groups, pinned_skips

ROLES = (Role.FFN, Role.HEAD, Role.KV_GROUP)
PLANNED = "units will be put in order"  # in the journal of a program on which later passes are only planned
TOLERANCE = 1e-5  # relative: the full model may move by rounding only


@dataclass(frozen=True, kw_only=True)
class Nest(Pass):
    """Permutes units of the `roles` (ffn, head, kv_group) by `importance`, and with `centre` takes the mean off the inputs of the layer that sums over them.

    `only` and `skip` match class names such as `layers.0.mlp.up.weight[0]`. `slice` cuts prefixes.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    uses_data: ClassVar[bool] = True
    importance: NestImportance = NestImportance.ELIMINATION
    centre: bool = False
    roles: tuple[Role, ...] = ROLES

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for every class of units; a skip for each that stays in its order."""
        if not ctx.calibration:
            raise CalibrationError(f"{self.name} needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
        groups, skips = self._groups(program)
        sizes = {g: 4 * g.size * g.parameters for g in groups}
        decisions = tuple(
            Decision(site=g.name, action=f"{g.role.value}: order {g.size} units", bytes_before=sizes[g], bytes_after=sizes[g], facts={"size": g.size})
            for g in groups
        )
        return Plan(pass_spec=self.to_spec(), decisions=decisions, skips=skips)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """No unit moves, and what is taken off is zero."""
        groups = self._planned(program, plan)
        means = {c.site.name: torch.zeros(c.site.columns) for g in groups for c in g.consumers}
        self._carry_out(program, {g: torch.arange(g.size) for g in groups}, means, PLANNED)

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Order, centre, and check that the outputs on the example inputs moved by rounding only."""
        groups = self._planned(program, plan)
        if not groups:
            return ()
        before = _outputs(program)
        self._carry_out(program, *self._ordered(program, groups, ctx), f"units in order of {self.importance.value}")
        moved = _difference(_outputs(program), before)
        if not moved <= TOLERANCE * (100 if any(t.dtype in (torch.float16, torch.bfloat16) for t in before) else 1):
            raise PassError(f"{self.to_spec()}: the outputs moved by {moved:.2e} of their size, expected at most {TOLERANCE}; please report the model")
        ctx.remarks.append(f"outputs on the example inputs moved by {moved:.1e} of their size")
        return plan.carried_out()

    def _ordered(self, program: Program, groups: list[Group], ctx: Context) -> tuple[dict[Group, Tensor], dict[str, Tensor]]:
        """Orders and means, made once a run and once over runs that share a checkpoint folder."""

        def compute() -> dict[str, Tensor]:
            orders, means = unit_orders(program, groups, self.importance, ctx, centred=self.centre)
            return {f"order {g.name}": order for g, order in orders.items()} | {f"mean {name}": mean for name, mean in means.items()}

        found = remembered(ctx, f"nest-{self.importance.value}-{self.centre}", [g.name for g in groups], program, compute)
        return {g: found[f"order {g.name}"] for g in groups}, {k.removeprefix("mean "): v for k, v in found.items() if k.startswith("mean ")}

    def _planned(self, program: Program, plan: Plan) -> list[Group]:
        wanted = {d.site for d in plan.decisions}
        return [g for g in self._groups(program)[0] if g.name in wanted]

    def _carry_out(self, program: Program, orders: Mapping[Group, Tensor], means: Mapping[str, Tensor], why: str) -> None:
        sites = {c.site.name: c.site for g in orders for c in g.consumers}
        with Editor(program, self.to_spec()) as editor:
            for site in [s for s in sites.values() if self.centre and why_not_centred(s) is None]:
                centre(editor, site, means[site.name], "mean taken off, so that every prefix has the right bias")
        cut(program, orders, self.to_spec(), why)

    def _groups(self, program: Program) -> tuple[list[Group], tuple[Skip, ...]]:
        structure = find_structure(program)
        groups = find_groups(program, structure, self.roles)
        reasons = {g: why for g in groups if (why := self.why_unnamed(g.name) or why_not_nested(g)) is not None}
        return [g for g in groups if g not in reasons], (*pinned_skips(structure, self.roles), *(Skip(g.name, why) for g, why in reasons.items()))


def why_not_nested(group: Group) -> str | None:
    """Reason why the group's units cannot be ordered, or None."""
    if not group.consumers:
        return "no plain layer sums over its units"
    odd = next((c.site for c in group.consumers if c.site.kind not in (SiteKind.LINEAR, SiteKind.ADDMM)), None)
    return f"{odd.name} sums over its units, and is no plain linear layer" if odd is not None else None


def _outputs(program: Program) -> list[Tensor]:
    """Of a text's first call where there are caches; these, returned last, are left out: their heads may have changed places."""
    found = [t for t in pytree.tree_leaves(program.run_inputs(program.inputs.start)) if isinstance(t, Tensor) and t.is_floating_point()]
    return found[: len(found) - len(program.inputs.cache_leaves)]


def _difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest `|a - b| / |b|` of all outputs."""
    return max((float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in zip(got, wanted, strict=True)), default=0.0)
