"""Recover: fine-tune the weights for a short while after pruning or factorizing, so that the model agrees with the original again.

Source of the objective: Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531): the original is the teacher. With `keep_zeros`
only the weights that pruning left are trained, so the sparsity stays. Smaller scopes are in `block_healing` and `chain_healing`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from torch import fx

from ..ir.program import Program
from ..ir.spec import option
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .block_healing import heal_blocks, why_not_blocks
from .chain_healing import heal_chains, why_not_chains
from .changed import Changed
from .context import Context
from .estimate import node_size
from .examples import training_data
from .trainable import Part, find_parts, part_bytes, select, write_back
from .training import criterion, fine_tune
from .training_options import TrainingOptions


class Scope(Enum):
    """How far what is minimised reaches."""

    MODEL = "model"  # the outputs of the model
    BLOCK = "block"  # the residual stream behind one layer after another
    LOCAL = "local"  # the outputs of one factorized weight after another

    @property
    def defaults(self) -> tuple[int, float]:
        """Steps and learning rate where none are given."""
        return {Scope.MODEL: (200, 1e-4), Scope.BLOCK: (40, 2e-4), Scope.LOCAL: (50, 1.0)}[self]


@dataclass(frozen=True, kw_only=True)
class Recover(Pass, TrainingOptions):
    """Trains plain weights, biases, norms and free parameters; leaves compressed weights and all buffers as they are.

    `steps` (of the model, of each layer, or of each chain of factors) and `lr` are those of the scope when 0. `changed` trains only what earlier passes
    changed or created.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.TRAINED
    uses_data: ClassVar[bool] = True
    scope: Scope = Scope.MODEL
    changed: bool = False
    steps: int = option(0, ge=0)
    lr: float = option(0.0, ge=0)

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision per part that will be trained; data without a loss is refused here, before any pass of the recipe runs."""
        data = training_data(ctx)
        if self.scope is Scope.MODEL:
            criterion(program, self, ctx, data)
        found, skips = find_parts(program)
        reasons = self._reasons(program, found, ctx)
        decisions = []
        for part in [p for p in found if p.node not in reasons]:
            size = part_bytes(program, part)
            decisions.append(Decision(site=part.name, action="train", bytes_before=size, bytes_after=size, flops=self._flops(part)))
        left_out = [Skip(p.name, reasons[p.node]) for p in found if p.node in reasons]
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=(*skips, *left_out))

    def _reasons(self, program: Program, parts: tuple[Part, ...], ctx: Context) -> dict[fx.Node, str]:
        """By node of a part why it is not trained, the first reason that holds."""
        chosen = {p.node for p in select(parts, self.trainable)}
        reasons = {p.node: why for p in parts if (why := self.why_unnamed(p.name)) is not None}
        reasons = {p.node: f"not in trainable={list(self.trainable)}" for p in parts if p.node not in chosen} | reasons
        if self.changed and ctx.original is not None:  # a plan made ahead does not know what will have changed
            changes = Changed(program)
            reasons = {p.node: "no earlier pass changed it, and changed=true" for p in parts if not changes.holds(p)} | reasons
        scoped = {Scope.MODEL: None, Scope.BLOCK: why_not_blocks, Scope.LOCAL: why_not_chains}[self.scope]
        return (scoped(program, [p for p in parts if p.node not in reasons], ctx.original) if scoped else {}) | reasons

    def _flops(self, part: Part) -> float:
        """Two a weight and row forward, four backward, two for the teacher; a chain of factors sees as many rows as its weight has columns."""
        if part.site is None:
            return 0.0
        options = self.resolved()
        size = part.site.columns if self.scope is Scope.LOCAL else node_size(part.node) / part.site.rows
        return 8.0 * options.steps * self.accumulate * part.site.parameters * size

    def resolved(self) -> Recover:
        """With steps and learning rate of the scope where none are given."""
        steps, lr = self.scope.defaults
        return replace(self, steps=self.steps or steps, lr=self.lr or lr)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Values change, nothing else."""

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Train, write the best weights back, and leave the losses in the report."""
        parts, options = self._parts(program, plan), self.resolved()
        if not parts:
            return ()
        if self.scope is Scope.MODEL:
            result = fine_tune(program, ctx.original, training_data(ctx), options, ctx, parts=parts)
            ctx.remarks.extend(result.notes)
            ctx.history.extend(result.history)
            why = f"{self.name}: {result.steps} steps, loss {result.before:.4g} -> {result.after:.4g}"
            return write_back(program, parts, result.tensors, self.to_spec(), why)
        healed = heal_blocks(program, parts, training_data(ctx), options, ctx) if self.scope is Scope.BLOCK else heal_chains(program, parts, options, ctx)
        ctx.remarks.extend(healed.notes)
        return write_back(program, parts, healed.tensors, self.to_spec(), healed.why, healed.facts)

    def _parts(self, program: Program, plan: Plan) -> tuple[Part, ...]:
        decided = {d.site for d in plan.decisions}
        return tuple(p for p in select(find_parts(program)[0], self.trainable) if p.name in decided)
