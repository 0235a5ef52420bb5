"""Gradients stretch by stretch are autograd's gradients, whatever the stretch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import CalibrationError
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind, WeightSite
from fxpress.passes import gradients
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.gradients import Gradients
from fxpress.passes.structured.loss import differentiable_losses

from ..tiny import fresh_program
from .nets import conv_net


@pytest.mark.parametrize("stretch", [1, 7, 10_000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_equal_autograd_over_the_whole_graph(name: str, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "STRETCH", stretch)
    program = fresh_program(name)
    ctx = Context(calibration=((program.inputs.args, program.inputs.kwargs),))
    sites = [s for s in program.sites() if s.kind is not SiteKind.EMBEDDING]
    found: dict[str, Tensor] = {}

    def visit(site: WeightSite, x: Tensor, slope: Tensor) -> None:
        assert x.shape[0] == slope.shape[0]
        found[site.name] = slope

    Gradients(program, sites, ctx).visit(visit, "test")
    want = _autograd(program, sites, ctx)
    assert set(found) == set(want)
    for site, slope in want.items():
        torch.testing.assert_close(found[site], slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max()))


def _autograd(program: Program, sites: list[WeightSite], ctx: Context) -> dict[str, Tensor]:
    weights = [s.tensors[0] for s in sites]
    loss, _, outputs = next(differentiable_losses(program, weights, [s.node.name for s in sites], ctx, "test"))
    slopes = torch.autograd.grad(loss, list(outputs), allow_unused=True)
    return {s.name: g for s, g in zip(sites, slopes, strict=True) if g is not None}


def test_an_infinite_loss_is_refused() -> None:
    program, _ = conv_net()
    ctx = Context(calibration=as_calls([torch.full((8, 3, 4, 4), float("3e38"))], program.inputs))
    with pytest.raises(CalibrationError, match="check the batch"):
        Gradients(program, list(program.sites()), ctx).visit(lambda *_: None, "test")
