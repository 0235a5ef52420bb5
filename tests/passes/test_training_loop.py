"""The loop on losses of one's own: what `relative` means, layouts, and held-out items that decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.weights import set_tensor
from fxpress.passes.context import Context
from fxpress.passes.trainable import find_parts
from fxpress.passes.training_loop import Leaves, Loop, Tensors
from fxpress.passes.training_options import TrainingOptions

from ..checks import assert_same
from .healing_nets import tower

OPTIONS = TrainingOptions(steps=8, lr=1e-2, evaluate_every=4)


def leaves(pattern: str = "head") -> Leaves:
    return Leaves.of(tower(), [p for p in find_parts(tower())[0] if p.name == pattern], keep_zeros=True)


def loop(scale: float, *, relative: bool, options: TrainingOptions = OPTIONS, items: tuple[list[Any], list[Any]] = ([1.0], [1.0])) -> Loop[Any]:
    def loss(target: Any, tensors: Tensors) -> Tensor:
        return scale * (tensors["head.weight"] - target).square().mean()

    return Loop(leaves(), loss, items, options, Context(), label="test", generator=torch.Generator().manual_seed(0), relative=relative)


def test_relative_makes_the_steps_independent_of_the_scale_and_reports_the_loss_itself() -> None:
    big, small = loop(1.0, relative=True), loop(2.0**-26, relative=True)
    losses = [one.run() for one in (big, small)]
    assert losses[1].best == pytest.approx(losses[0].best * 2.0**-26) and losses[0].best < losses[0].start
    torch.testing.assert_close(dict(big.tensors), dict(small.tensors))
    plain = loop(2.0**-26, relative=False)
    plain.run()  # gradients far below Adam's epsilon
    assert float((plain.leaves.weights["head.weight"] - small.leaves.weights["head.weight"]).detach().abs().max()) > 1e-3


def test_held_out_items_decide() -> None:
    worse = loop(1.0, relative=False, items=([1.0], [float(get_tensor(tower().graph_module, "head.weight").detach().mean())]), options=replace(OPTIONS, lr=1.0))
    standing = worse.run()
    assert standing.best == standing.start and not worse.tensors and len(standing.history) == 3


def test_steps_that_are_too_long_are_taken_back_and_shortened() -> None:
    start = get_tensor(tower().graph_module, "head.weight").detach().clone()
    near = torch.full_like(start, 0.01).add(start)
    far = loop(1.0, relative=False, items=([near], [near]), options=replace(OPTIONS, steps=60, lr=1.0, patience=20))
    standing = far.run()
    assert standing.setbacks >= 2 and standing.slowed == 0.25**standing.setbacks
    assert standing.best < 0.5 * standing.start and standing.stopped == ""
    near_enough = loop(1.0, relative=False, options=replace(OPTIONS, lr=1e-3)).run()
    assert near_enough.setbacks == 0 and near_enough.slowed == 1.0


def test_leaves_are_contiguous_copies_as_a_checkpoint_gives_them_back() -> None:
    program = tower().clone()
    weight = get_tensor(program.graph_module, "head.weight").detach()
    set_tensor(program.graph_module, "head.weight", weight.t().contiguous().t(), parameter=True)
    found = Leaves.of(program, [p for p in find_parts(program)[0] if p.name == "head"], keep_zeros=False)
    assert found.weights["head.weight"].is_contiguous() and found.weights["head.weight"].requires_grad and not found.kept
    assert_same(found.bound(found.weights)["head.weight"].detach(), weight)


def test_refusals() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        Leaves.of(tower(), [], keep_zeros=True)
    with pytest.raises(TrainingError, match="test: the loss is nan before the first step"):
        loop(float("nan"), relative=True).run()
