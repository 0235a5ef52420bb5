"""Switch one-way convolutions between their two forms, over the same stored filters: composed for training, factored for running. Exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.edit import Editor
from ..ir.nodes import get_tensor
from ..ir.oneway import OneWay, compose, factor, find_oneways
from ..ir.program import Program
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .oneway_conv import Form


@dataclass(frozen=True, kw_only=True)
class OnewayForm(Pass):
    """Every one-way convolution takes the form `to`; `only` and `skip` match the names of the convolutions they were."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    to: Form = Form.FACTORED

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for each that changes."""
        found = find_oneways(program)
        reasons = {o.name: self._why_not(o) for o in found}
        sizes = {o.name: sum(get_tensor(program.graph_module, t).nbytes for t in o.filters.values()) for o in found}
        return Plan(
            pass_spec=self.to_spec(),
            decisions=tuple(Decision(site=n, action=self.to.value, bytes_before=sizes[n], bytes_after=sizes[n]) for n, why in reasons.items() if why is None),
            skips=tuple(Skip(n, why) for n, why in reasons.items() if why is not None),
        )

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Change the form, and nothing that is stored."""
        chosen = {d.site for d in plan.decisions}
        with Editor(program, self.to_spec()) as editor:
            for one in [o for o in find_oneways(program) if o.name in chosen]:
                (compose if self.to is Form.COMPOSED else factor)(editor, one, f"the same filters, {self.to.value}")
        return plan.carried_out()

    def _why_not(self, one: OneWay) -> str | None:
        if (unnamed := self.why_unnamed(one.name)) is not None:
            return unnamed
        return f"it is {self.to.value} already" if one.composed == (self.to is Form.COMPOSED) else None
