"""Train one set of weights to be a good model at several widths at once (MatFormer, arXiv 2310.07707, section 3).

Every width is a view of the full model (`slice.prefix_view`), so a step at half the width does half of the feed-forward arithmetic, and its gradients reach the
prefixes it read. By default one width is drawn a step and all layers take it; `joint` sums the losses of all widths instead, weighted by the same
probabilities (equal ones: the first version's; 2.6 times the arithmetic, and gradients without the noise of drawing). With `mixed` a step also trains one
of as many Mix'n'Match models with the weight of an average width (ours: where only the widths are trained, models between them are worse than the line).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ir.axes import analyze_axes
from ...ir.program import Program
from ...ir.structure import Role, find_structure
from ...ir.weights import named_tensors
from ..context import Context
from ..examples import Example, split
from ..slice import Slice, prefix_view, rounded
from ..structured.groups import find_groups
from ..tapped import Tapped
from ..trainable import Part
from ..training import Teacher, criterion, with_teacher
from ..training_loop import Leaves, Loop, Tensors
from ..training_options import TrainingOptions
from ..training_state import Standing
from .mixes import mixes

Item = Example | tuple[Example, int]  # a held-out item names its width


class _Student:
    """The model at one width, run with prefixes of the full weights."""

    def __init__(self, small: Program) -> None:
        self.run = Tapped(small)
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(small.graph_module)}

    def prefixes(self, tensors: Tensors) -> dict[str, Tensor]:
        """Views of the full tensors, through which gradients flow."""
        return {n: t[tuple(slice(0, size) for size in self._shapes[n])] for n, t in tensors.items() if n in self._shapes}


class NestedTrainer:
    """One run: a student for every share, one teacher (the full original) for all of them."""

    def __init__(
        self,
        program: Program,
        parts: Sequence[Part],
        data: Sequence[Example],
        options: TrainingOptions,
        ctx: Context,
        *,
        shares: Sequence[float],
        probabilities: Sequence[float],
        joint: bool,
        multiple_of: int,
        mixed: int,
    ) -> None:
        self.shares, self.joint, self._program = tuple(shares), joint, program
        self._chances = torch.tensor(probabilities, dtype=torch.float64, device="cpu")
        options = with_teacher(options, ctx.original)
        self._criterion = criterion(program, options, ctx, data)
        self._teacher = Teacher(ctx.original, (), options.cache) if ctx.original is not None and self._criterion.distils() else None
        slices = [Slice(ratio=float(share), multiple_of=multiple_of, allow_empty=True) for share in self.shares]
        self._students = [_Student(prefix_view(program, one)) for one in slices]
        self._mixed = [_Student(prefix_view(program, Slice(widths=m, multiple_of=1))) for m in self._mixes(mixed, multiple_of, ctx)]
        training, held_out = split(tuple(data), options.held_out, ctx.generator())
        self._held_out = held_out
        items: tuple[Sequence[Item], Sequence[Item]] = (training, [(e, place) for e in held_out for place in range(len(self.shares))])
        leaves = Leaves.of(program, parts, keep_zeros=options.keep_zeros)
        self.loop: Loop[Item] = Loop(leaves, self._loss, items, options, ctx, label="train_nested", generator=ctx.generator())

    def run(self) -> Standing:
        """Train, or go on where a checkpoint stands; widths are drawn at the run's seed."""
        with self.loop.ctx.training_mode():
            return self.loop.run()

    def losses(self, weights: Mapping[str, Tensor]) -> list[float]:
        """Held-out loss at every width, of weights under one name each; those not named are the program's own."""
        bound = self.loop.leaves.bound(self.loop.leaves.weights | dict(weights)) if weights else {}
        with torch.no_grad():
            return [sum(float(self._at(e, s, bound)) for e in self._held_out) / len(self._held_out) for s in self._students]

    def _mixes(self, count: int, multiple_of: int, ctx: Context) -> list[tuple[int, ...]]:
        """Widths of the Mix'n'Match models that are trained too."""
        if not count:
            return []
        groups = find_groups(self._program, find_structure(self._program, analyze_axes(self._program, prefixes=True)), (Role.FFN,))
        return mixes([[rounded(float(s), g.size, multiple_of) for s in self.shares] for g in groups], count, ctx.generator())

    def _loss(self, item: Item, tensors: Tensors) -> Tensor:
        if isinstance(item, tuple):
            return self._at(item[0], self._students[item[1]], tensors)
        if not self.joint:
            return self._at(item, self._students[int(torch.multinomial(self._chances, 1))], tensors)
        weighted = list(zip((self._chances / self._chances.sum()).tolist(), self._students, strict=True))
        if self._mixed:
            weighted.append((1 / len(self._students), self._mixed[int(torch.randint(len(self._mixed), ()))]))
        return torch.stack([weight * self._at(item, student, tensors) for weight, student in weighted if weight]).sum()

    def _at(self, example: Example, student: _Student, tensors: Tensors) -> Tensor:
        reply = self._teacher(example) if self._teacher is not None else None
        inputs = self._program.inputs.flatten(*example.call)
        return self._criterion(example, inputs, student.run(example.call, student.prefixes(tensors)), reply)
