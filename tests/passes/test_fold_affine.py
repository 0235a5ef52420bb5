"""Batch norm folding is exact, removes the node, and leaves alone what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import PassError
from fxpress.ir.journal import Action
from fxpress.passes.context import Context
from fxpress.passes.fold_affine import FoldAffine
from fxpress.passes.pipeline import run_pipeline

from .nets import conv_net, tied_net


def _randomise(norm: nn.Module) -> None:
    for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
        assert isinstance(tensor, Tensor)
        tensor.data.uniform_(0.5, 2.0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 7, 7)),
        (lambda b: nn.Conv1d(4, 6, 3, bias=b), nn.BatchNorm1d, (2, 4, 9)),
        (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (5, 4)),
    ],
)
def test_folding_is_exact_in_float64(layer: Any, norm: Any, shape: tuple[int, ...], bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer(bias), norm(6, affine=affine)).eval().double()
    _randomise(net[1])
    x = torch.randn(*shape, dtype=torch.float64)
    program = capture(net, (x,))
    done = run_pipeline(program, [FoldAffine()], Context()).program
    assert not any("batch_norm" in str(n.target) for n in done.graph.nodes)
    torch.testing.assert_close(done.run(x), net(x), rtol=1e-12, atol=1e-12)
    removed = [c for c in done.journal.changes if c.action is Action.REMOVED]
    assert [c.before.module for c in removed if c.before and "batch_norm" in c.before.op] == ["1"]


def test_a_conv_output_used_twice_is_skipped_with_the_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.norm(y) + y
            return out

    program = capture(Twice().eval(), (torch.randn(1, 3, 5, 5),))
    with pytest.raises(PassError, match="its output is also used by"):
        run_pipeline(program, [FoldAffine()], Context())


def test_net_without_batch_norm_touches_nothing() -> None:
    program, ctx = tied_net()
    with pytest.raises(PassError, match="nothing it applies to"):
        run_pipeline(program, [FoldAffine()], ctx)


def test_fold_then_quantize_composes() -> None:
    program, ctx = conv_net()
    from fxpress.passes.base import parse_pass

    done = run_pipeline(program, [FoldAffine(), parse_pass("quantize_rtn{bits=8}")], ctx).program
    x = ctx.calibration[0][0][0]
    assert (done.run(x) - program.run(x)).norm() / program.run(x).norm() < 0.02
    with pytest.raises(PassError, match="fold before quantizing"):
        run_pipeline(program, [parse_pass("quantize_rtn{bits=8}"), FoldAffine()], ctx)
