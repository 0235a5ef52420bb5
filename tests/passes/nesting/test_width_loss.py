"""Losses at widths: masks are slices, nothing is lost at full width, and curves between measured points."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.examples import Example
from fxpress.passes.nesting.width_loss import WidthLoss, curve, single_losses
from fxpress.passes.structured.groups import find_groups

from .nets import nested


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_masked_loss_is_the_slice_s(name: str) -> None:
    program, ctx = nested(name)
    groups = find_groups(program, find_structure(program), (Role.FFN,))
    loss = WidthLoss(program, groups, ctx, 3)
    assert loss({}) == pytest.approx(0.0, abs=1e-6) and loss({g: g.size for g in groups}) == loss({})
    widths = {groups[0]: 24, groups[1]: 40}
    small = fxpress.optimize(program, "slice{widths=[24,40]}").program
    judge = WidthLoss(program, groups, ctx, 3)
    judge._run = type(judge._run)(small)
    judge._full = loss._full
    assert loss(widths) == pytest.approx(judge({}), rel=1e-3) and loss(widths) > 1e-4
    assert len(loss._examples) == 3 and isinstance(loss._examples[0], Example)


def test_losses_of_single_layers_are_remembered(tmp_path: Path) -> None:
    program, ctx = nested("llama")
    groups = find_groups(program, find_structure(program), (Role.FFN,))
    counted = 0

    class Counting(WidthLoss):
        def __call__(self, widths: object) -> float:
            nonlocal counted
            counted += 1
            return super().__call__(widths)  # type: ignore[arg-type]

    kept = Context(calibration=ctx.calibration, checkpoint=Checkpoint(tmp_path / "run", "one"))
    first = single_losses(Counting(program, groups, kept, 1), program, groups, (0.75, 0.5), kept, 1)
    again = Context(calibration=ctx.calibration, checkpoint=Checkpoint(tmp_path / "run", "one"))
    assert single_losses(Counting(program, groups, again, 1), program, groups, (0.75, 0.5), again, 1) == first
    assert counted == 4 and all(losses[0] < losses[1] for losses in first.values())


def test_curves_go_through_what_was_measured() -> None:
    shares, losses = (0.75, 0.5), (0.1, 0.9)
    assert curve(shares, losses, 1.0) == 0.0
    assert [curve(shares, losses, s) for s in shares] == [pytest.approx(v, rel=1e-5) for v in losses]
    assert curve(shares, losses, 0.875) == pytest.approx(0.1 / 4)
    values = [curve(shares, losses, 1 - i / 16) for i in range(16)]
    assert values == sorted(values) and curve(shares, losses, 0.25) > 0.9
    assert curve((0.75, 0.5), (0.2, 0.1), 0.5) == pytest.approx(0.2)  # noise: more cut does not cost less
    assert curve((0.5,), (0.4,), 0.25) == pytest.approx(0.4 * 1.5**2) and torch.is_tensor(torch.zeros(1))
