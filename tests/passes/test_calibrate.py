"""Statistics equal those of hooks on the eager model, whatever the batching; bad data is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxpress.ir.errors import CalibrationError
from fxpress.passes.base import Need
from fxpress.passes.calibrate import CalibrationWalk, as_calls, site_groups

from .nets import ConvNet, conv_net, tied_net

ALL = Need.MEAN | Need.MEAN_ABS | Need.MEAN_SQUARE | Need.ABS_MAX | Need.GRAM


def test_statistics_equal_float64_reference_on_linears() -> None:
    program, ctx = tied_net()
    walk = CalibrationWalk(program, ctx.calibration)
    sites = {s.name: s for s in program.sites()}
    embed = program.graph_module.get_parameter(sites["embed"].tensors[0]).double()
    ids = torch.cat([c[0][0] for c in ctx.calibration])
    x = embed[ids].flatten(0, 1)
    statistics = walk.statistics([sites["up"]], ALL)
    assert statistics.tokens == ids.numel()
    torch.testing.assert_close(statistics.gram[0].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(statistics.mean[0].double(), x.mean(0), rtol=1e-4, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(statistics.mean_square[0].double(), x.square().mean(0), rtol=1e-4, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(statistics.mean_abs[0].double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(statistics.abs_max[0].double(), x.abs().amax(0), rtol=1e-6, atol=1e-7)  # type: ignore[index]


def test_grouped_convolution_rows_reproduce_the_convolution() -> None:
    program, ctx = conv_net()
    site = next(s for s in program.sites() if s.name == "depthwise")
    statistics = CalibrationWalk(program, ctx.calibration).statistics([site], Need.GRAM)
    assert statistics.gram is not None and statistics.gram.shape == (16, 9, 9)
    # w^T Gram w is the mean square of the convolution's output without bias: checked against F.conv2d
    captured: list[torch.Tensor] = []
    net = ConvNet()
    net.load_state_dict(dict(program.graph_module.state_dict()), strict=False)
    net.eval().depthwise.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        for args, _ in ctx.calibration:
            net(*args)
    out = F.conv2d(torch.cat(captured), net.depthwise.weight, padding=1, groups=16).double()
    w = site.matrix().double()
    want = out.square().mean((0, 2, 3))
    got = torch.einsum("gk,gkl,gl->g", w, statistics.gram.double(), w)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_walk_holds_only_live_values() -> None:
    program, ctx = conv_net()
    walk = CalibrationWalk(program, ctx.calibration)
    head = program.sites()[-1]
    walk.run_before(head.node)
    held = {n.name for n in walk._values[0]}
    assert held == {head.data.name}


def test_sites_with_one_input_share_a_group() -> None:
    class Twins(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.c(self.a(x) * self.b(x))
            return out

    from fxpress.ir.capture import capture

    program = capture(Twins(), (torch.randn(2, 8),))
    assert [[s.name for s in g] for g in site_groups(program.sites())] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration is empty"),
        ([torch.randn(8, 3, 4, 5)], "expected shape"),
        ([torch.randn(8, 3, 4, 4).double()], "expected dtype"),
        ([torch.full((8, 3, 4, 4), float("nan"))], "NaN or infinite"),
        ([(torch.randn(8, 3, 4, 4), torch.randn(1))], "expected 1 positional"),
        (["text"], "expected a tensor"),
    ],
)
def test_bad_calibration_is_refused_with_the_batch_and_the_reason(batches: list[object], message: str) -> None:
    program, _ = conv_net()
    with pytest.raises(CalibrationError, match=message):
        as_calls(batches, program.inputs)


def test_missing_calibration_is_refused() -> None:
    program, _ = conv_net()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        CalibrationWalk(program, ())
