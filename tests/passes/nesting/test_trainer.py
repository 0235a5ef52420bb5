"""The nested trainer: losses at a width are the slice's, gradients reach prefixes only, and draws follow their probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fxpress
from fxpress.passes.nesting.trainer import NestedTrainer
from fxpress.passes.nesting.width_loss import WidthLoss
from fxpress.passes.trainable import find_parts
from fxpress.passes.training_options import TrainingOptions

from .nets import nested


def trainer(**options: Any) -> NestedTrainer:
    program, ctx = nested("llama")
    given: dict[str, Any] = {"shares": (0.25, 0.5, 1.0), "probabilities": (0.2, 0.3, 0.5), "joint": False, "multiple_of": 8, "mixed": 0} | options
    ctx = replace(ctx, original=program)
    from fxpress.passes.examples import training_data

    return NestedTrainer(program, find_parts(program)[0], training_data(ctx), TrainingOptions(steps=2, held_out=0.5), ctx, **given)


def test_the_loss_of_a_width_is_the_slice_s() -> None:
    one = trainer()
    program, ctx = nested("llama")
    quarter, half, full = one.losses({})
    assert full == pytest.approx(0, abs=1e-6) and quarter > half > full
    judge = WidthLoss(fxpress.optimize(program, "slice{ratio=0.5}").program, (), ctx, 4)
    whole = WidthLoss(program, (), ctx, 4)
    held = [next(i for i, c in enumerate(ctx.calibration) if c is e.call) for e in one._held_out]
    judge._examples, judge._full = [judge._examples[i] for i in held], whole._full
    assert half == pytest.approx(judge({}), rel=1e-3)


def test_gradients_reach_the_prefix_alone() -> None:
    one = trainer()
    weights = one.loop.leaves.weights
    one._at(one._held_out[0], one._students[1], one.loop.leaves.bound(weights)).backward()
    for name, axis in (("model.layers.0.mlp.gate_proj.weight", 0), ("model.layers.0.mlp.up_proj.weight", 0), ("model.layers.0.mlp.down_proj.weight", 1)):
        gradient = weights[name].grad
        assert gradient is not None
        moved = gradient.movedim(axis, 0)
        assert float(moved[:40].abs().min(1).values.max()) > 0 and float(moved[48:].abs().max()) == 0


def test_one_width_a_step_or_all() -> None:
    one, joint, mixed = trainer(), trainer(joint=True), trainer(joint=True, mixed=1)
    places = {id(s): p for each in (one, joint, mixed) for p, s in enumerate([*each._students, *each._mixed])}
    torch.manual_seed(0)
    asked: list[int] = []
    one._at = lambda example, student, tensors: asked.append(places[id(student)]) or torch.zeros(())  # type: ignore[method-assign, func-returns-value]
    for _ in range(300):
        one._loss(one._held_out[0], {})
    shares = [asked.count(p) / 300 for p in range(3)]
    assert all(abs(s - p) < 0.1 for s, p in zip(shares, (0.2, 0.3, 0.5), strict=True))
    asked.clear()
    joint._at = mixed._at = one._at  # type: ignore[method-assign]
    joint._loss(joint._held_out[0], {})
    one._loss((one._held_out[0], 2), {})
    mixed._loss(mixed._held_out[0], {})
    assert asked == [0, 1, 2, 2, 0, 1, 2, 3]
