"""Recover: fine-tune the weights for a short while after pruning or factorizing, so that the model agrees with the original again.

Source of the objective: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531): the original is the teacher. With `keep_zeros`
only the weights that pruning left are trained, so the sparsity stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Program
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .estimate import node_size
from .examples import training_data
from .trainable import Part, find_parts, part_bytes, select, write_back
from .training import criterion, fine_tune
from .training_options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Recover(Pass, TrainingOptions):
    """Trains plain weights, biases, norms and free parameters; leaves compressed weights and all buffers as they are."""

    guarantee: ClassVar[Guarantee] = Guarantee.TRAINED
    uses_data: ClassVar[bool] = True

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision per part that will be trained; data without a loss is refused here, before any pass of the recipe runs."""
        criterion(program, self, ctx, training_data(ctx))
        found, skips = find_parts(program)
        decisions, left_out = [], list(skips)
        chosen = {p.name for p in select(found, self.trainable)}
        for part in found:
            why = self.why_unnamed(part.name) or (None if part.name in chosen else f"not in trainable={list(self.trainable)}")
            if why is None:
                size = part_bytes(program, part)
                decisions.append(Decision(site=part.name, action="train", bytes_before=size, bytes_after=size, flops=self._flops(part)))
            else:
                left_out.append(Skip(part.name, why))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=tuple(left_out))

    def _flops(self, part: Part) -> float:
        """Two a weight and row forward, four backward, two for the teacher."""
        if part.site is None:
            return 0.0
        return 8.0 * self.steps * self.accumulate * part.site.parameters * node_size(part.node) / part.site.rows

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Values change, nothing else."""

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Train, write the best weights back, and leave the losses in the report."""
        parts = self._parts(program, plan)
        if not parts:
            return ()
        result = fine_tune(program, ctx.original, training_data(ctx), self, ctx, parts=parts)
        ctx.remarks.extend(result.notes)
        return write_back(program, parts, result.tensors, self.to_spec(), f"{self.name}: {result.steps} steps, loss {result.before:.4g} -> {result.after:.4g}")

    def _parts(self, program: Program, plan: Plan) -> tuple[Part, ...]:
        decided = {d.site for d in plan.decisions}
        return tuple(p for p in select(find_parts(program)[0], self.trainable) if p.name in decided)
