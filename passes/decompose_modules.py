"""Modular decomposition: smaller inner widths of feed-forward networks and attention heads, the outputs of the modules kept as well as they can be.

Source: MoDeGPT (arXiv 2408.09632): feed-forward by Nystrom, queries and keys by CR, values and outputs by SVD, layers by entropic allocation. No weight is
split in two: the model stays a model of ordinary linears. Ours: bases and choices that look at what the loss feels, one basis for all output heads that share
a value head, rotary pairs of every key head's own, compensation by ridge regression in the model as compressed so far, and amounts by marginal loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.axes import analyze_axes
from ..ir.edit import Editor
from ..ir.errors import CalibrationError, PassError, SpecError
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import option
from ..ir.structure import Role
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context
from .drop_blocks import layer_influence
from .entropic import entropic
from .head_bases import change_scores, change_values, order_channels
from .memory import Tensors, remembered
from .modules.facts import Neurons, Pairs, Recipe, Values, maps_keys, module_facts, order_key, score_key
from .modules.finding import Found, Module, Part, find_modules, find_tables, give_own_tables
from .modules.refits import refit_by_nystrom
from .structured.amounts import STEPS, Counts, Limits, Schedule, change, choose_indices, first_indices, ranked, refuse_budget
from .structured.anchor import compensate_anchored
from .structured.compensate import Compensation, compensate
from .structured.groups import Group, cut


class Refit(Enum):
    """What the sites behind a smaller width do about it."""

    NYSTROM = "nystrom"  # down-projections fitted to dense inputs, as published
    ANCHORED = "anchored"  # as ridge, aiming at the dense model's residual stream
    RIDGE = "ridge"  # down and output projections, with a bias, in the model as compressed so far; the ridge by cross-validation


class Allocation(Enum):
    """How much every layer loses."""

    UNIFORM = "uniform"
    ENTROPIC = "entropic"  # less in layers that change their stream more, as published
    LOSS = "loss"  # every width as much as its estimated loss a parameter allows


@dataclass(frozen=True, kw_only=True)
class _Multiples(Limits):
    """Widths keep a multiple of `multiple_of`; channels of heads of `head_multiple` (rotary pairs are two channels)."""

    head_multiple: int = 8

    def step(self, group: Group) -> int:
        if group.role is Role.FFN:
            return super().step(group)
        own = max(1, self.head_multiple // 2) if group.role is Role.ROPE else self.head_multiple
        return own if group.size >= 2 * own else 1


@dataclass(frozen=True, kw_only=True)
class DecomposeModules(Pass):
    """Keeps `ratio` of the parameters of the projections that modules are made of. `parts` leaves out kinds of modules.

    As published: `neurons=leverage,values=own,pairs=norms,refit=nystrom,allocation=entropic` (`temperature`, `cap`, `ridge` are its constants). `only` and
    `skip` match class names such as `layers.0.mlp.up.weight[0]`.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True
    ratio: float = option(gt=0.0, lt=1.0)
    parts: tuple[Part, ...] = ()
    neurons: Neurons = Neurons.ELIMINATION
    values: Values = Values.STACKED
    pairs: Pairs = Pairs.SLOPES
    refit: Refit = Refit.RIDGE
    allocation: Allocation = Allocation.LOSS
    temperature: float = option(0.15, gt=0.0)
    cap: float = option(0.8, gt=0.0, lt=1.0)
    ridge: float = option(0.01, gt=0.0)
    multiple_of: int = option(8, ge=1)
    head_multiple: int = option(8, ge=1)
    min_keep: float = option(0.1, ge=0.0, le=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation is Allocation.LOSS and (self.neurons is Neurons.LEVERAGE or self.values is Values.OWN or self.pairs is Pairs.NORMS):
            raise SpecError(
                f"{self.name}: allocation=loss compares scores in units of the loss, which neurons=leverage, values=own and pairs=norms do not have; "
                "use allocation=entropic or uniform with them"
            )

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for every width that shrinks, a skip with a reason for every other."""
        if not ctx.calibration:
            raise CalibrationError(f"{self.name} needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
        found = self._found(program, ctx)
        skips = list(found.skips)
        counts = self._counts(program, found, ctx) if found.modules else {}
        skips += [Skip(m.name, f"{m.part.value}: keeps all {m.axis.size}") for m in found.modules if counts[m.group] == m.axis.size]
        decisions = tuple(_decision(m, counts[m.group]) for m in found.modules if counts[m.group] < m.axis.size)
        return Plan(pass_spec=self.to_spec(), decisions=decisions, skips=tuple(skips))

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Cut the sizes only."""
        kept = self._planned(self._found(program, ctx).modules, plan)
        self._give_tables(program, plan, ctx)
        cut(program, first_indices({m.group: k for m, k in kept.items()}), self.to_spec(), "preview")

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Change bases (exact), refit what reads the widths, cut."""
        found = self._found(program, ctx)
        facts, before, work = self._facts(program, found.modules, ctx), program.parameters, found.modules[0].group.analysis.macs()
        self._give_tables(program, plan, ctx)
        modules = find_modules(program, self.parts or tuple(Part)).modules
        counts = self._planned(modules, plan)
        kept = {m: choose_indices(facts[score_key(m)].float(), k) for m, k in counts.items()}
        with Editor(program, self.to_spec()) as editor:
            for module in kept:
                self._rebase(editor, module, facts)
            errors = self._refit(editor, modules, kept, ctx)
        cut(program, {m.group: k for m, k in kept.items()}, self.to_spec(), "modular decomposition")
        left = analyze_axes(program).macs()
        ctx.remarks.append(f"parameters {change(before, program.parameters)}, multiply-accumulates {change(work, left)}")
        return tuple(_result(m, k, facts, errors) for m, k in kept.items())

    def _found(self, program: Program, ctx: Context) -> Found:
        """The modules, on a clone whose attentions have rotary tables of their own; found once for these weights."""
        parts = self.parts or tuple(Part)
        known: Found | None = ctx.memory.recall(key := ("modules", parts, self.only, self.skip), program)
        if known is not None:
            return known
        clone = program.clone()
        turns, skips = find_tables(clone) if Part.QUERY_KEY in parts else ({}, [])
        give_own_tables(clone, self.to_spec(), turns.values())
        found = find_modules(clone, parts)
        if not found.modules and not found.skips:
            skips.append(Skip("(model)", "it has no feed-forward network and no attention"))
        left_out = [Skip(m.name, why) for m in found.modules if (why := self.why_unnamed(m.name)) is not None]
        names = {s.site for s in left_out}
        modules = tuple(m for m in found.modules if m.name not in names)
        return ctx.memory.keep(key, program, Found(modules, (*skips, *found.skips, *left_out), turns))

    def _give_tables(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Rotary tables of their own for the attentions whose queries and keys the plan makes narrower."""
        named, found = {d.site for d in plan.decisions}, self._found(program, ctx)
        narrower = [m.attention.q.name for m in found.modules if m.part is Part.QUERY_KEY and m.name in named and m.attention.q is not None]
        give_own_tables(program, self.to_spec(), [found.turns[name] for name in narrower if name in found.turns])

    def _planned(self, modules: tuple[Module, ...], plan: Plan) -> dict[Module, int]:
        by_name = {m.name: m for m in modules}
        missing = [d.site for d in plan.decisions if d.site not in by_name]
        if missing:
            raise PassError(f"{self.name}: the plan names {missing[0]}, which this program does not have; plan again")
        return {by_name[d.site]: int(d.facts["kept"]) for d in plan.decisions}

    def _facts(self, program: Program, modules: tuple[Module, ...], ctx: Context) -> Tensors:
        """Bases, orders and scores, made once for these weights, over killed runs too."""
        recipe = Recipe(neurons=self.neurons, values=self.values, pairs=self.pairs, ridge=self.ridge)
        work = modules[0].group.analysis.program
        key = f"modules-{self.neurons.value}-{self.values.value}-{self.pairs.value}-{self.ridge}"
        return remembered(ctx, key, [m.name for m in modules], program, lambda: module_facts(work, modules, recipe, ctx))

    def _counts(self, program: Program, found: Found, ctx: Context) -> Counts:
        groups = [m.group for m in found.modules]
        limits = _Multiples(multiple_of=self.multiple_of, head_multiple=self.head_multiple, min_keep=self.min_keep)
        if self.allocation is Allocation.LOSS:
            facts = self._facts(program, found.modules, ctx)
            schedule = ranked(groups, limits, {m.group: facts[score_key(m)] for m in found.modules}, lambda g: g.parameters)
        else:
            schedule = self._by_layer(program, groups, limits, ctx)
        share = _share(found.modules, self.refit)
        counts = schedule.closest(lambda c: share(c) <= self.ratio)
        if counts is None:
            raise refuse_budget(f"{self.to_spec()}: the modules", self.ratio, share(schedule.at(schedule.levels)))
        return counts

    def _by_layer(self, program: Program, groups: list[Group], limits: Limits, ctx: Context) -> Schedule:
        """Level l removes l / STEPS on average, of every layer its entropic or an equal share."""
        layers = sorted({g.layer for g in groups if g.layer is not None})
        influence = layer_influence(program, ctx) if self.allocation is Allocation.ENTROPIC else {}
        missing = [layer for layer in layers if layer not in influence] if self.allocation is Allocation.ENTROPIC else []
        if missing or (not layers and self.allocation is Allocation.ENTROPIC):
            raise PassError(f"{self.name}: allocation=entropic needs residual layers, which {missing or 'this model'} has not; use allocation=uniform or loss")

        def at(level: int) -> Counts:
            average = level / STEPS
            shares = dict.fromkeys(layers, average)
            if influence:
                found = entropic(torch.tensor([influence[i] for i in layers], dtype=torch.float64), min(average, self.cap), self.temperature, self.cap)
                shares = dict(zip(layers, found.tolist(), strict=True))
            wanted = {g: g.size * (1 - (shares[g.layer] if g.layer is not None else average)) for g in groups}
            return {g: min(limits.counts(g), key=lambda k: (abs(k - wanted[g]), -k)) for g in groups}

        return Schedule(round(STEPS * (self.cap if influence else 1.0)), at)

    def _refit(self, editor: Editor, modules: tuple[Module, ...], kept: Mapping[Module, Tensor], ctx: Context) -> dict[str, float]:
        if self.refit is Refit.NYSTROM:
            return refit_by_nystrom(editor, kept, ctx)
        if self.refit is Refit.RIDGE:
            return compensate(editor, {m.group: k for m, k in kept.items()}, Compensation.WEIGHTS, ctx)
        return compensate_anchored(editor, {m.group: kept.get(m, torch.arange(m.axis.size)) for m in modules}, ctx)

    def _rebase(self, editor: Editor, module: Module, facts: Tensors) -> None:
        names, why = maps_keys(module), "exact change of basis: what matters least comes last"
        if names[0] in facts:
            assert module.heads is not None
            rebase = change_values if module.part is Part.VALUE_OUTPUT else change_scores
            rebase(editor, module.heads, module.axis, facts[names[0]], facts[names[1]], why)
        elif order_key(module) in facts:
            assert module.heads is not None
            order_channels(editor, module.heads, module.axis, facts[order_key(module)], "exact change of order: what matters least comes last")


def _share(modules: tuple[Module, ...], refit: Refit) -> Callable[[Counts], float]:
    """A function from counts to the kept share of the projections' parameters, biases that the refit adds included."""
    analysis = modules[0].group.analysis
    sites = {s.name: s for m in modules for s in (m.attention.sites if m.heads is not None else _network(m))}
    total, whole = sum(s.parameters for s in sites.values()), analysis.parameters()
    outputs = {m.output.name: m.output for m in modules if m.part is not Part.QUERY_KEY}.values()
    added = sum(s.rows for s in outputs if s.bias is None and s.kind is not SiteKind.MM) if refit is not Refit.NYSTROM else 0

    def share(counts: Counts) -> float:
        left = analysis.parameters({g.axis.atom: torch.arange(k) for g, k in counts.items()})
        return 1 - (whole - left - added) / total

    return share


def _network(module: Module) -> tuple[WeightSite, ...]:
    """The sites of the feed-forward network whose hidden width the module is."""
    sites = {s.tensors[0]: s for s in module.group.analysis.program.sites()}
    return tuple(dict.fromkeys(sites[o.tensor] for o in module.axis.occurrences if o.tensor in sites))


def _decision(module: Module, kept: int) -> Decision:
    group = module.group
    holds, saved = group.size * group.parameters, (group.size - kept) * group.parameters
    facts = {"size": group.size, "kept": kept, "parameters_saved": saved, "macs_saved": (group.size - kept) * group.macs}
    action = f"{module.part.value}: keep {kept} of {group.size}"
    return Decision(site=group.name, action=action, bytes_before=4 * holds, bytes_after=4 * (holds - saved), facts=facts)


def _result(module: Module, kept: Tensor, facts: Tensors, errors: Mapping[str, float]) -> SiteResult:
    decision, scores = _decision(module, len(kept)), facts[score_key(module)]
    found = dict(decision.facts) | {"score_removed": 1 - float(scores[kept].sum() / scores.sum().clamp_min(1e-300))}
    if module.part is not Part.QUERY_KEY and module.output.name in errors:
        found["output_error"] = errors[module.output.name]
    return SiteResult(site=decision.site, action=decision.action, bytes_before=decision.bytes_before, bytes_after=decision.bytes_after, facts=found)
