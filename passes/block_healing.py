"""Healing layer by layer: the weights of each are trained until the residual stream behind it is the original's again.

Source: block refinement towards the uncompressed model's outputs under the compressed model's own inputs, as in AA-SVD (arXiv 2604.02119). A layer reads
the compressed stream so far, healed layers before it included, and its target is the original's stream at the same place, so that it also makes up for what
the layers before it could not. Backpropagation never leaves the layer, and no logits are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..ir.errors import PassError, TrainingError
from ..ir.nodes import node_type, op_name
from ..ir.program import Program
from ..ir.structure import find_structure
from .changed import Changed
from .context import Context
from .examples import Example, split
from .losses import kept_tokens, rows, stream_error
from .stretches import Stretches
from .trainable import Healing, Part, readers
from .training_loop import Leaves, Loop, Tensors
from .training_options import TrainingOptions
from .training_state import Standing


@dataclass(frozen=True)
class Cuts:
    """Where the residual stream starts, and the additions that end its layers, in graph order; names of nodes that program and original share."""

    source: str
    ends: tuple[str, ...]


def find_cuts(program: Program, original: Program) -> Cuts:
    """The last addition of every layer of the original that the program still has, by name, operator and type; edits keep the names of what they replace."""
    structure = find_structure(original)
    place = {n: i for i, n in enumerate(original.graph.nodes)}
    ends = sorted({max((b.node for b in layer), key=place.__getitem__) for layer in structure.layers if layer}, key=place.__getitem__)
    here = {n.name: n for n in program.graph.nodes}
    common = [n.name for n in ends if n.name in here and (op_name(n), node_type(n)) == (op_name(here[n.name]), node_type(here[n.name]))]
    if not common:
        found = f"of the {len(ends)} additions that end the original's layers, the program has none of the same name and shape" if ends else "it has none"
        raise PassError(f"scope=block heals layer by layer along a residual stream; {found}. Use scope=model")
    source = min((r.source for r in structure.residuals), key=place.__getitem__).name
    return Cuts(source if source in here else next(n.name for n in program.graph.nodes if n.op == "placeholder"), tuple(common))


def why_not_blocks(program: Program, parts: Sequence[Part], original: Program | None) -> dict[fx.Node, str]:
    """By node of a part the reason why its layer is not healed, or why the part stays as it is in it.

    Without an original (a plan made ahead) only a model without a residual stream is refused; what earlier passes will have changed is not known yet.
    """
    if original is None:
        if not program.journal.changes:
            find_cuts(program, program)
        return {}
    cuts = find_cuts(program, original)
    stretches = Stretches(program, (), (cuts.source, *cuts.ends)).stretches
    index = {n: i for i, stretch in enumerate(stretches) for n in stretch}
    changed = _changed_stretches(program, original, cuts, stretches)
    reasons: dict[fx.Node, str] = {}
    for part in parts:
        mine = index.get(part.node, 0)
        outside = [n.name for n in readers(program, part) if index.get(n, 0) != mine]
        if mine == 0:
            reasons[part.node] = "stands outside of the residual layers that the program and the original have in common; scope=model trains it"
        elif mine not in changed:
            reasons[part.node] = "no earlier pass changed its layer; scope=model trains it all the same"
        elif outside:
            reasons[part.node] = f"its tensor is also read outside of its layer, by {outside[0]}; scope=model trains it"
    return reasons


def _changed_stretches(program: Program, original: Program, cuts: Cuts, stretches: Sequence[Sequence[fx.Node]]) -> set[int]:
    """Stretches with a node that the journal names, in the program or in the original (removed ones)."""
    changed = Changed(program).nodes
    there = Stretches(original, (), cuts.ends).stretches
    before = {n.name for n in stretches[0]}
    sides = ({n.name for n in (*mine, *theirs)} - before for mine, theirs in zip(stretches[1:], there, strict=True))
    return {i for i, names in enumerate(sides, 1) if names & changed}


def heal_blocks(program: Program, parts: Sequence[Part], data: Sequence[Example], options: TrainingOptions, ctx: Context, *, label: str = "recover") -> Healing:
    """Train the tensors of `parts` layer by layer; neither program is changed. A layer that does not get better on held-out batches keeps its weights."""
    if ctx.original is None:
        raise TrainingError("scope=block needs the original program; run the pass in fxpress.optimize, or use scope=model with objective=task")
    with ctx.training_mode():
        return _BlockHealer(program, ctx.original, parts, data, options, ctx).run(label)


class _BlockHealer:
    """Student and teacher side by side, one layer after another."""

    def __init__(self, program: Program, original: Program, parts: Sequence[Part], data: Sequence[Example], options: TrainingOptions, ctx: Context) -> None:
        self.program, self.options, self.ctx = program, options, ctx
        cuts, calls = find_cuts(program, original), [e.call for e in data]
        self.student = Stretches(program, calls, (cuts.source, *cuts.ends))
        self.teacher = Stretches(original, calls, cuts.ends)
        nodes = [set(stretch) for stretch in self.student.stretches[1:]]
        self.parts = [[p for p in parts if p.node in mine] for mine in nodes]
        self.ends = cuts.ends
        self.masks = [kept_tokens(e) for e in data]
        self.generator = ctx.generator()
        self.items = split(tuple(range(len(data))), options.held_out, self.generator)

    def run(self, label: str) -> Healing:
        """Heal every layer with something to train; what follows the last one is not run."""
        self.student.advance()
        standings: dict[int, Standing] = {}
        last = max((i for i, mine in enumerate(self.parts) if mine), default=-1)
        for number in self.ctx.track(range(last + 1), label):
            targets = self.teacher.advance()
            if self.parts[number]:
                standings[number] = self._heal(number, targets, f"{label}-block-{number:03d}")
            if number < last:
                self.student.advance()
        return self._healing(standings)

    def _heal(self, number: int, targets: Sequence[Tensor], label: str) -> Standing:
        leaves = Leaves.of(self.program, self.parts[number], keep_zeros=self.options.keep_zeros)

        def loss(call: int, tensors: Tensors) -> Tensor:
            keep = self.masks[call]
            return stream_error(rows(self.student.end(call, tensors), keep), rows(targets[call], keep))

        loop = Loop(leaves, loss, self.items, self.options, self.ctx, label=label, generator=self.generator, relative=True)
        standing = loop.run()
        self.student.tensors |= leaves.bound(loop.best)
        return standing

    def _healing(self, standings: Mapping[int, Standing]) -> Healing:
        facts, why = {}, {}
        for number, standing in standings.items():
            for part in self.parts[number]:
                facts[part.name] = {"layer_loss_before": standing.start, "layer_loss_after": standing.best}
                why[part.name] = f"recover: layer up to {self.ends[number]}, {standing.step} steps, loss {standing.start:.4g} -> {standing.best:.4g}"
        return Healing(dict(self.student.tensors), facts, why, tuple(self._notes(standings)))

    def _notes(self, standings: Mapping[int, Standing]) -> list[str]:
        training, held = self.items
        where = "one batch, nothing held out" if training is held else f"{len(training)} training and {len(held)} held-out batches"
        better = sum(s.best < s.start for s in standings.values())
        losses = ", ".join(f"{self.ends[i]} {s.start:.3g} -> {s.best:.3g}" for i, s in standings.items())
        notes = [f"{better} of {len(standings)} layers got better ({where}, at most {self.options.steps} steps each); loss at their ends: {losses}"]
        stopped = [f"{self.ends[i]}: {s.stopped}" for i, s in standings.items() if s.stopped]
        return [*notes, *(f"stopped early at {s}" for s in stopped[:5]), *([f"and {len(stopped) - 5} more stopped early"] if len(stopped) > 5 else [])]
