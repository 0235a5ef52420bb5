"""The loss that gradients for importances are taken of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...ir.nodes import get_tensor
from ...ir.program import Program
from ..context import Context
from ..examples import Example, training_data
from ..losses import Criterion, Objective, find_language
from ..tapped import Reply, Tapped


def gradient_examples(ctx: Context) -> tuple[Example, ...]:
    """The batches gradients are averaged over: as many labelled training batches as there are calibration batches (at least 8), else the calibration data."""
    labelled = [e for e in ctx.training if e.target is not None]
    return tuple(labelled[: max(8, len(ctx.calibration))]) or tuple(Example(c) for c in ctx.calibration) or training_data(ctx)


def task_criterion(program: Program, ctx: Context) -> Criterion:
    """The task's loss: the user's, or next tokens of a language model."""
    return Criterion(objective=Objective.TASK, loss=ctx.loss, language=find_language(program))


def example_loss(criterion: Criterion, program: Program, example: Example, reply: Reply, generator: torch.Generator) -> Tensor:
    """The task's loss where the example has one (a label, a user's loss, next tokens), else a random projection of the outputs.

    The gradient of the projection measures how sensitive the outputs are, without labels (Hutchinson's estimate of `||dy||^2`; ours).
    """
    if criterion.why_not(example) is None:
        return criterion(example, program.inputs.flatten(*example.call), reply, None)
    outputs = [leaf for leaf in reply.leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([(o.float() * torch.randn(o.shape, generator=generator, device="cpu").to(o.device)).sum() for o in outputs]).sum()


def differentiable_losses(
    program: Program, tensors: Iterable[str], taps: Sequence[str], ctx: Context, label: str
) -> Iterator[tuple[Tensor, dict[str, Tensor], Sequence[Tensor]]]:
    """Per batch the loss, and what to differentiate it by: copies of the named tensors, and the values of the nodes named in `taps`."""
    criterion = task_criterion(program, ctx)
    runner, generator, names = Tapped(program, taps), ctx.generator(), list(dict.fromkeys(tensors))
    for example in ctx.track(gradient_examples(ctx), label):
        weights = {n: get_tensor(program.graph_module, n).detach().clone().requires_grad_() for n in names}
        with torch.enable_grad():
            reply = runner(example.call, weights)
            loss = example_loss(criterion, program, example, reply, generator)
        yield loss, weights, reply.hidden
