"""The loop of every training run: float32 copies of the trained tensors, AdamW, early stopping on held-out items, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..ir.errors import TrainingError
from ..ir.nodes import get_tensor
from ..ir.program import Program
from ..ir.weights import alias_classes
from .context import Context
from .trainable import Part, zero_mask
from .training_options import TrainingOptions
from .training_state import Standing, load_state, save_state

T = TypeVar("T")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Leaves:
    """One float32 leaf per trained tensor, however many names it has, and where its zeros must stay."""

    program: Program
    weights: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    kept: dict[str, Tensor]

    @staticmethod
    def of(program: Program, parts: Sequence[Part], *, keep_zeros: bool) -> Leaves:
        """Copies of the tensors of `parts`; with `keep_zeros`, masks of the sparse weights of sites."""
        module, aliases = program.graph_module, alias_classes(program.graph_module)
        matrices = {aliases.of(p.site.tensors[0])[0] for p in parts if p.site is not None}
        leaves = Leaves(program, {}, {}, {})
        for name in dict.fromkeys(aliases.of(t)[0] for p in parts for t in p.tensors):
            old = get_tensor(module, name).detach()
            kind = torch.promote_types(old.dtype, torch.float32)
            leaves.weights[name] = old.to(kind).clone(memory_format=torch.contiguous_format).requires_grad_()  # as a checkpoint gives it back
            leaves.names[name] = aliases.of(name)
            mask = zero_mask(old) if keep_zeros and name in matrices else None
            if mask is not None:
                leaves.kept[name] = mask
        if not leaves.weights:
            raise TrainingError("nothing to train: the program has no float weights, or trainable, only and skip leave none")
        return leaves

    def bound(self, weights: Tensors) -> dict[str, Tensor]:
        """The weights in the program's own types, under all their names."""
        module = self.program.graph_module
        return {alias: cast for name, w in weights.items() for cast in (w.to(get_tensor(module, name).dtype),) for alias in self.names[name]}


class Loop(Generic[T]):
    """Trains `leaves` on `loss(item, tensors)`, evaluated on held-out items every `evaluate_every` steps; the best weights are kept.

    A run that stands above its start goes back to the best weights and takes shorter steps.
    `label` names progress bar and checkpoint. `relative` divides what the optimizer sees by the held-out loss at the start, so that clipping and Adam's
    epsilon mean the same for small losses.
    """

    def __init__(
        self,
        leaves: Leaves,
        loss: Callable[[T, Tensors], Tensor],
        items: tuple[Sequence[T], Sequence[T]],
        options: TrainingOptions,
        ctx: Context,
        *,
        label: str,
        generator: torch.Generator,
        relative: bool = False,
    ) -> None:
        self.leaves, self.loss, self.options, self.ctx, self.label, self.relative = leaves, loss, options, ctx, label, relative
        self.training, self.held_out = items
        self.order = _order(len(self.training), options.steps * options.accumulate, generator)
        self.best: dict[str, Tensor] = {}
        self.optimizer = torch.optim.AdamW(list(leaves.weights.values()), lr=options.lr, weight_decay=options.weight_decay)

    def run(self) -> Standing:
        """Train to the end, or go on where a checkpoint stands."""
        self.standing = load_state(self.ctx, self.label, self.leaves.weights, self.best, self.optimizer) or self._start()
        for _ in self.ctx.track(range(self.options.steps - self.standing.step), self.label, status=lambda: f"loss {self.standing.best:.4g}"):
            if self.standing.stopped:
                break
            self._step()
            self._after_step()
        return self.standing

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The best weights in the program's types, under one name each; empty while the start is not beaten."""
        bound = self.leaves.bound(self.best)
        return {name: bound[name] for name in self.best}

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
        """One optimizer step over `accumulate` items; a loss or gradient that is not finite stops the run instead."""
        options, step, weights = self.options, self.standing.step, self.leaves.weights
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place in range(step * options.accumulate, (step + 1) * options.accumulate):
            with self._autocast():
                loss = self.loss(self.training[self.order[place]], self.leaves.bound(weights)) / (options.accumulate * self._unit())
            if not loss.requires_grad:
                raise TrainingError(f"{self.label}: the loss depends on no trained tensor; check trainable=, and that the loss function keeps gradients")
            loss.backward()
            total += float(loss.detach())
        for name, mask in self.leaves.kept.items():
            if (grad := weights[name].grad) is not None:
                grad.mul_(mask)
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), options.clip))
        self.standing.step += 1
        if not isfinite(total) or not isfinite(norm):
            what = f"loss {total}" if not isfinite(total) else f"gradient norm {norm}"
            self.standing.stopped = f"step {self.standing.step} gave {what}; a smaller lr may help"
            return
        self.optimizer.param_groups[0]["lr"] = options.rate(step) * self.standing.slowed
        self.optimizer.step()
        with torch.no_grad():
            for name, mask in self.leaves.kept.items():
                weights[name].mul_(mask)

    def _unit(self) -> float:
        return self.standing.start if self.relative else 1.0

    def _after_step(self) -> None:
        """Evaluate and save when it is time."""
        standing, options = self.standing, self.options
        done = standing.step == options.steps
        if not standing.stopped and (done or standing.step % options.evaluate_every == 0):
            loss = self._evaluate()
            if standing.take(loss):
                self.best = {name: w.detach().clone() for name, w in self.leaves.weights.items()}
            elif standing.stale >= options.patience and not done:
                standing.stopped = f"{standing.stale} evaluations without a better one"
            elif not loss < standing.start and not done:
                self._go_back()
        if done or standing.stopped or standing.step % options.checkpoint_every == 0:
            save_state(self.ctx, self.label, standing, self.leaves.weights, self.best, self.optimizer)

    def _go_back(self) -> None:
        """Steps that end above the start were too long: go on from the best weights with a quarter of the rate, and nothing of the momentum."""
        self.standing.setbacks += 1
        self.optimizer.state.clear()
        with torch.no_grad():
            for name, weight in self.leaves.weights.items():
                weight.copy_(self.best.get(name, get_tensor(self.leaves.program.graph_module, name)))

    def _evaluate(self) -> float:
        """Mean loss of the held-out items, without autocast."""
        with torch.no_grad():
            return sum(float(self.loss(i, self.leaves.bound(self.leaves.weights))) for i in self.held_out) / len(self.held_out)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.options.dtype.autocast
        return torch.autocast(next(iter(self.leaves.weights.values())).device.type, dtype=dtype, enabled=dtype is not None)


def _order(count: int, steps: int, generator: torch.Generator) -> list[int]:
    """Indices of `steps` items out of `count`: one random permutation after another."""
    epochs = -(-steps // count)
    return [i for _ in range(epochs) for i in torch.randperm(count, generator=generator, device="cpu").tolist()][:steps]
