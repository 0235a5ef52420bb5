"""Train nested: one set of weights that is a good model at several widths (MatFormer, arXiv 2310.07707), from scratch or from a nested dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.errors import PassError, SpecError
from ..ir.program import Program
from ..ir.spec import option
from .base import Decision, Guarantee, Pass, Plan, SiteResult
from .context import Context
from .examples import training_data
from .nesting.trainer import NestedTrainer
from .slice import nested_sites
from .trainable import find_parts, part_bytes, select, write_back
from .training import criterion
from .training_options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class TrainNested(Pass, TrainingOptions):
    """Trains weights, biases and norms so that every share of the feed-forward units in `widths` is a good model; `slice` and `Elastic` take them out.

    One width is drawn a step with `probabilities` (those of MatFormer's table 6 that favour the full model), or with `joint` all of them are trained in
    every step, their losses weighted by the probabilities, and one of `mixes` Mix'n'Match models between neighbouring widths. The objective is `recover`'s:
    agreement with the original, or the task's loss (`objective=task`, from scratch).
    """

    guarantee: ClassVar[Guarantee] = Guarantee.TRAINED
    uses_data: ClassVar[bool] = True
    widths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    probabilities: tuple[float, ...] = (0.20, 0.22, 0.24, 0.34)
    joint: bool = False
    mixes: int = option(0, ge=0)
    multiple_of: int = option(8, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or any(not 0 < w <= 1 for w in self.widths) or sorted(set(self.widths)) != list(self.widths):
            raise SpecError(f"{self.name}: widths are shares of the units that rise up to 1, for example widths=[0.25,0.5,1.0]; got {list(self.widths)}")
        if len(self.probabilities) != len(self.widths) or any(p < 0 for p in self.probabilities) or sum(self.probabilities) <= 0:
            raise SpecError(f"{self.name}: expected one probability for each of the {len(self.widths)} widths, none negative; got {list(self.probabilities)}")
        if self.mixes and not self.joint:
            raise SpecError(f"{self.name}: mixes are trained beside the widths in one step, so they need joint=true")

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for every part that will be trained."""
        if not nested_sites(program):
            raise PassError(
                f"{self.to_spec()}: the units are in no order of importance; put nest before (from scratch any order will do: nest{{importance=wanda}})"
            )
        criterion(program, self, ctx, training_data(ctx))
        found, skips = find_parts(program)
        chosen = [p for p in select(found, self.trainable) if self.why_unnamed(p.name) is None]
        sizes = {p.name: part_bytes(program, p) for p in chosen}
        return Plan(
            pass_spec=self.to_spec(),
            decisions=tuple(Decision(site=n, action="train nested", bytes_before=size, bytes_after=size) for n, size in sizes.items()),
            skips=skips,
        )

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Values change, nothing else."""

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Train, and leave the loss of every width before and after in the report."""
        decided = {d.site for d in plan.decisions}
        parts = [p for p in find_parts(program)[0] if p.name in decided]
        if not parts:
            return ()
        trainer = NestedTrainer(
            program,
            parts,
            training_data(ctx),
            self,
            ctx,
            shares=self.widths,
            probabilities=self.probabilities,
            joint=self.joint,
            multiple_of=self.multiple_of,
            mixed=self.mixes,
        )
        before = trainer.losses({})
        standing = trainer.run()
        ctx.history.extend(standing.history)
        after = trainer.losses(trainer.loop.best) if trainer.loop.best else before
        ctx.remarks.extend(f"width {w:.4g}: held-out loss {a:.4g} -> {b:.4g}" for w, a, b in zip(self.widths, before, after, strict=True))
        if standing.stopped:
            ctx.remarks.append(f"stopped early: {standing.stopped}")
        why = f"{self.name}: {standing.step} steps, mean loss {standing.start:.4g} -> {standing.best:.4g}"
        return write_back(program, parts, trainer.loop.tensors, self.to_spec(), why)
