"""Fine-tune a program's weights end to end on a private copy, for every pass that trains; the loop itself is `training_loop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.errors import TrainingError
from ..ir.operators import composed
from ..ir.program import Program
from .context import Context
from .estimate import most_rows
from .examples import Example, split
from .losses import Criterion, Objective, find_language
from .tapped import Reply, Tapped, hidden_nodes
from .trainable import Part, find_parts, select
from .training_loop import Leaves, Loop, Tensors
from .training_options import TrainingOptions
from .training_state import Standing


@dataclass(frozen=True)
class TrainingResult:
    """What training found: the best weights by name (empty when the start was never beaten), held-out losses, and sentences for a report."""

    tensors: Mapping[str, Tensor]
    before: float
    after: float
    steps: int
    history: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]


def fine_tune(
    program: Program,
    teacher: Program | None,
    data: Sequence[Example],
    options: TrainingOptions,
    ctx: Context,
    *,
    parts: Sequence[Part] | None = None,
    label: str = "recover",
) -> TrainingResult:
    """Train copies of the tensors of `parts` (default: all that `options.trainable` selects); neither program is changed.

    `label` names progress bar and checkpoint, and must differ between runs of one pass. The result goes back through `write_back`.

    Raises `TrainingError` for data without a loss, a missing teacher, and a loss that is not finite before the first step.
    """
    chosen = select(find_parts(program)[0], options.trainable) if parts is None else parts
    with ctx.training_mode():
        return _Trainer(program, teacher, data, options, ctx, chosen, label).run()


def criterion(program: Program, options: TrainingOptions, ctx: Context, data: Sequence[Example]) -> Criterion:
    """The loss these options ask for, after a check that every batch has one."""
    found = Criterion(
        objective=options.objective,
        outputs=options.outputs,
        temperature=options.temperature,
        hidden=options.hidden,
        loss=ctx.loss,
        language=find_language(program),
    )
    for index, example in enumerate(data):
        if (reason := found.why_not(example)) is not None:
            raise TrainingError(f"training batch {index}: {reason}")
    return found


class _Trainer:
    """One end-to-end run: student and teacher, and the loop over the data."""

    def __init__(
        self, program: Program, teacher: Program | None, data: Sequence[Example], options: TrainingOptions, ctx: Context, parts: Sequence[Part], label: str
    ) -> None:
        self.options, self.program = with_teacher(options, teacher), program
        self.criterion = criterion(program, self.options, ctx, data)
        needed = teacher if self.criterion.distils() else None
        self.taps = hidden_nodes(program, needed) if needed is not None and options.hidden else []
        self.student = Tapped(composed(program, most_rows(program, (e.call for e in data))), self.taps)
        self.teacher = Teacher(needed, self.taps, options.cache) if needed is not None else None
        leaves, generator = Leaves.of(program, parts, keep_zeros=options.keep_zeros), ctx.generator()
        items = split(tuple(data), options.held_out, generator)
        self.loop = Loop(leaves, self._loss, items, self.options, ctx, label=label, generator=generator)

    def run(self) -> TrainingResult:
        """Train, and say how it went."""
        standing = self.loop.run()
        return TrainingResult(self.loop.tensors, standing.start, standing.best, standing.step, tuple(standing.history), tuple(self._notes(standing)))

    def _loss(self, example: Example, tensors: Tensors) -> Tensor:
        reply = self.teacher(example) if self.teacher is not None else None
        return self.criterion(example, self.program.inputs.flatten(*example.call), self.student(example.call, tensors), reply)

    def _notes(self, standing: Standing) -> list[str]:
        options, loop = self.options, self.loop
        where = f"{len(loop.training)} training and {len(loop.held_out)} held-out batches"
        where = "one batch, nothing held out" if loop.training is loop.held_out else where
        notes = [f"loss {standing.start:.4g} -> {standing.best:.4g} ({where}); {standing.step} of {options.steps} steps, best at step {standing.best_step}"]
        if standing.stopped:
            notes.append(f"stopped early: {standing.stopped}")
        if standing.setbacks:
            notes.append(f"{standing.setbacks} evaluations above the start: training went back to the best weights, with a quarter of lr={options.lr:g} each")
        if not loop.best and len(standing.history) > 1:
            notes.append("training never beat the start; the weights are as they were")
        if options.hidden and self.teacher is not None and not self.taps:
            notes.append("hidden had no effect: the program and the original have no residual addition in common")
        return notes


class Teacher:
    """The original's replies, kept for batches that come again while they fit into `limit` MiB; held-out batches come first."""

    def __init__(self, program: Program, taps: Sequence[str], limit: int) -> None:
        self._run, self._left, self._kept = Tapped(program, taps), limit * 2**20, dict[int, Reply]()

    def __call__(self, example: Example) -> Reply:
        """What the original says to a batch, without gradients."""
        reply = self._kept.get(id(example))
        if reply is None:
            with torch.no_grad():
                reply = self._run(example.call)
            size = sum(v.nbytes for v in (*reply.leaves, *reply.hidden) if isinstance(v, Tensor))
            if size <= self._left:
                self._left -= size
                self._kept[id(example)] = reply
        return reply


def with_teacher(options: TrainingOptions, teacher: Program | None) -> TrainingOptions:
    """Without a teacher, `auto` is the task alone; what asks for a teacher is refused."""
    if teacher is not None:
        return options
    if options.objective in (Objective.DISTILL, Objective.BOTH):
        raise TrainingError(f"objective={options.objective.value} needs the original program; run the pass in fxpress.optimize, or use objective=task")
    return replace(options, objective=Objective.TASK)
