"""Fine-tune a program's weights on a private copy: the loop, early stopping and checkpoints, for every pass that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from ..ir.errors import TrainingError
from ..ir.nodes import get_tensor
from ..ir.program import Program
from ..ir.weights import alias_classes
from .context import Context
from .examples import Example, split
from .losses import Criterion, Objective, find_language
from .tapped import Tapped, hidden_nodes
from .trainable import Part, find_parts, select, zero_mask
from .training_options import TrainingOptions
from .training_state import Standing, load_state, save_state


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
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(ctx.seed)
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
    """One run: float32 copies of the trained tensors, their optimizer, and where it stands."""

    def __init__(
        self, program: Program, teacher: Program | None, data: Sequence[Example], options: TrainingOptions, ctx: Context, parts: Sequence[Part], label: str
    ) -> None:
        self.options, self.ctx, self.label, self.program = _with_teacher(options, teacher), ctx, label, program
        self.criterion = criterion(program, self.options, ctx, data)
        needed = teacher if self.criterion.distils() else None
        self.taps = hidden_nodes(program, needed) if needed is not None and options.hidden else []
        self.student, self.teacher = Tapped(program, self.taps), Tapped(needed, self.taps) if needed is not None else None
        self._copy_weights(parts)
        generator = ctx.generator()
        self.training, self.held_out = split(tuple(data), options.held_out, generator)
        self.order = _order(len(self.training), options.steps * options.accumulate, generator)
        self.best: dict[str, Tensor] = {}
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=options.lr, weight_decay=options.weight_decay)

    def _copy_weights(self, parts: Sequence[Part]) -> None:
        """One float32 leaf per tensor, however many names it has, and the zeros to keep."""
        module, aliases = self.program.graph_module, alias_classes(self.program.graph_module)
        matrices = {aliases.of(p.site.tensors[0])[0] for p in parts if p.site is not None}
        self.weights: dict[str, Tensor] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self.kept: dict[str, Tensor] = {}
        for tensor in (t for p in parts for t in p.tensors):
            name = aliases.of(tensor)[0]
            if name in self.weights:
                continue
            old = get_tensor(module, name).detach()
            self.weights[name] = old.to(torch.promote_types(old.dtype, torch.float32), copy=True).requires_grad_()
            self.names[name] = aliases.of(name)
            mask = zero_mask(old) if self.options.keep_zeros and name in matrices else None
            if mask is not None:
                self.kept[name] = mask
        if not self.weights:
            raise TrainingError("nothing to train: the program has no float weights, or trainable, only and skip leave none")

    def run(self) -> TrainingResult:
        """Train to the end, or go on where a checkpoint stands."""
        self.standing = load_state(self.ctx, self.label, self.weights, self.best, self.optimizer) or self._start()
        for _ in self.ctx.track(range(self.options.steps - self.standing.step), self.label, status=lambda: f"loss {self.standing.best:.4g}"):
            if self.standing.stopped:
                break
            self._step()
            self._after_step()
        return self._result()

    def _start(self) -> Standing:
        standing = Standing()
        loss = self._evaluate()
        if not isfinite(loss):
            raise TrainingError(f"{self.label}: the loss is {loss} before the first step; check the data, the loss function, and the passes before this one")
        standing.take(loss)
        standing.start = loss
        standing.stopped = "there is nothing to recover: the loss is 0" if abs(loss) < 1e-9 else ""
        return standing

    def _step(self) -> None:
        """One optimizer step over `accumulate` batches; a loss or gradient that is not finite stops the run instead."""
        options, step = self.options, self.standing.step
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place in range(step * options.accumulate, (step + 1) * options.accumulate):
            with self._autocast():
                loss = self._loss(self.training[self.order[place]]) / options.accumulate
            if not loss.requires_grad:
                raise TrainingError(f"{self.label}: the loss depends on no trained tensor; check trainable=, and that the loss function keeps gradients")
            loss.backward()
            total += float(loss.detach())
        for name, mask in self.kept.items():
            if (grad := self.weights[name].grad) is not None:
                grad.mul_(mask)
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), options.clip))
        self.standing.step += 1
        if not isfinite(total) or not isfinite(norm):
            what = f"loss {total}" if not isfinite(total) else f"gradient norm {norm}"
            self.standing.stopped = f"step {self.standing.step} gave {what}; a smaller lr may help"
            return
        self.optimizer.param_groups[0]["lr"] = options.rate(step)
        self.optimizer.step()
        with torch.no_grad():
            for name, mask in self.kept.items():
                self.weights[name].mul_(mask)

    def _after_step(self) -> None:
        """Evaluate and save when it is time."""
        standing, options = self.standing, self.options
        done = standing.step == options.steps
        if not standing.stopped and (done or standing.step % options.evaluate_every == 0):
            if standing.take(self._evaluate()):
                self.best = {name: w.detach().clone() for name, w in self.weights.items()}
            elif standing.stale >= options.patience and not done:
                standing.stopped = f"{standing.stale} evaluations without a better one"
        if done or standing.stopped or standing.step % options.checkpoint_every == 0:
            save_state(self.ctx, self.label, standing, self.weights, self.best, self.optimizer)

    def _evaluate(self) -> float:
        """Mean loss of the held-out batches, without autocast."""
        with torch.no_grad():
            return sum(float(self._loss(e)) for e in self.held_out) / len(self.held_out)

    def _loss(self, example: Example) -> Tensor:
        reply = None
        if self.teacher is not None:
            with torch.no_grad():
                reply = self.teacher(example.call)
        student = self.student(example.call, self._bound(self.weights))
        return self.criterion(example, self.program.inputs.flatten(*example.call), student, reply)

    def _bound(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights in the program's own types, under all their names."""
        module = self.program.graph_module
        return {alias: cast for name, w in weights.items() for cast in (w.to(get_tensor(module, name).dtype),) for alias in self.names[name]}

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.options.dtype.autocast
        return torch.autocast(next(iter(self.weights.values())).device.type, dtype=dtype, enabled=dtype is not None)

    def _result(self) -> TrainingResult:
        standing = self.standing
        bound = self._bound(self.best)
        tensors = {name: bound[name] for name in self.best}
        return TrainingResult(tensors, standing.start, standing.best, standing.step, tuple(standing.history), tuple(self._notes()))

    def _notes(self) -> list[str]:
        standing, options = self.standing, self.options
        where = f"{len(self.training)} training and {len(self.held_out)} held-out batches"
        where = "one batch, nothing held out" if self.training is self.held_out else where
        notes = [f"loss {standing.start:.4g} -> {standing.best:.4g} ({where}); {standing.step} of {options.steps} steps, best at step {standing.best_step}"]
        if standing.stopped:
            notes.append(f"stopped early: {standing.stopped}")
        if not self.best and len(standing.history) > 1:
            notes.append("training never beat the start; the weights are as they were")
        if options.hidden and self.teacher is not None and not self.taps:
            notes.append("hidden had no effect: the program and the original have no residual addition in common")
        return notes


def _with_teacher(options: TrainingOptions, teacher: Program | None) -> TrainingOptions:
    """Without a teacher, `auto` is the task alone; what asks for a teacher is refused."""
    if teacher is not None:
        return options
    if options.objective in (Objective.DISTILL, Objective.BOTH):
        raise TrainingError(f"objective={options.objective.value} needs the original program; run the pass in fxpress.optimize, or use objective=task")
    return replace(options, objective=Objective.TASK)


def _order(batches: int, count: int, generator: torch.Generator) -> list[int]:
    """Indices of `count` batches: one random permutation after another."""
    epochs = -(-count // batches)
    return [i for _ in range(epochs) for i in torch.randperm(batches, generator=generator).tolist()][:count]
