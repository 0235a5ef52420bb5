"""The loss behind gradients: the task's where there is one, else a projection of the outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxpress.ir.program import Program
from fxpress.passes.context import Call
from fxpress.passes.cross_entropy import cross_entropy, next_token
from fxpress.passes.examples import Example, Labelled, as_examples
from fxpress.passes.losses import Criterion, Objective, find_language
from fxpress.passes.structured.loss import example_loss, gradient_examples
from fxpress.passes.tapped import Reply, Tapped

from .nets import mlp, tiny_with_data


def _loss(program: Program, call: Call, target: Tensor | None = None) -> tuple[Tensor, Reply]:
    criterion = Criterion(objective=Objective.TASK, language=find_language(program))
    reply = Tapped(program)(call)
    return example_loss(criterion, program, Example(call, target), reply, torch.Generator().manual_seed(0)), reply


def test_labels_next_tokens_or_a_projection() -> None:
    program, ctx = mlp()
    call = ctx.calibration[0]
    labelled, reply = _loss(program, call, torch.zeros(64, dtype=torch.int64))
    torch.testing.assert_close(labelled, cross_entropy(reply.leaves[0], torch.zeros(64, dtype=torch.int64)))
    projection, reply = _loss(program, call)
    torch.testing.assert_close(projection, (reply.leaves[0] * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))).sum())
    program, ctx = tiny_with_data("gpt2")
    language, reply = _loss(program, ctx.calibration[0])
    mask = ctx.calibration[0][1]["attention_mask"].bool()
    torch.testing.assert_close(language, next_token(reply.leaves[0], ctx.calibration[0][1]["input_ids"], mask))


def test_gradients_come_from_labelled_batches_or_calibration() -> None:
    program, ctx = mlp()
    assert [e.call for e in gradient_examples(ctx)] == list(ctx.calibration)
    plain, labelled = ctx.calibration[0][0], Labelled(ctx.calibration[0][0], torch.zeros(64, dtype=torch.int64))
    both = replace(ctx, training=as_examples([plain, *[labelled] * 20], program.inputs))
    assert [e.target is not None for e in gradient_examples(both)] == [True] * 8
    assert [e.call for e in gradient_examples(replace(ctx, training=as_examples([plain], program.inputs)))] == list(ctx.calibration)
