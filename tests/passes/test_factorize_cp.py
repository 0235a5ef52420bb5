"""CP convolutions in a graph: geometry, one-way filters, data against weights, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import PassError, SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.cp import Canonical
from fxpress.passes.factorize_cp import FactorizeCp
from fxpress.passes.factorize_svd import Metric

from .nets import correlated


def _conv(rank: int, *shape: int, **geometry: object) -> nn.Module:
    """A convolution whose kernel has `rank` terms."""
    conv = (nn.Conv1d if len(shape) == 3 else nn.Conv2d)(shape[1], shape[0], shape[2:], **geometry)  # type: ignore[arg-type]
    kernel = Canonical(factors=tuple(torch.randn(n, rank, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate(shape))).tensor()
    with torch.no_grad():
        conv.weight.copy_(kernel)
    return nn.Sequential(conv).eval()


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((16, 8, 3, 5), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
        ((16, 8, 1, 5), {"stride": (2, 2), "padding": (1, 2)}),
        ((16, 8, 5), {"stride": 2, "padding": 2}),
    ],
)
def test_a_kernel_of_known_rank_is_exact_with_its_geometry(shape: tuple[int, ...], geometry: dict[str, object]) -> None:
    net = _conv(2, *shape, **geometry)
    x = correlated(6, 8, 12, 14) if len(shape) == 4 else correlated(6, 8, 20)
    for metric in (Metric.WEIGHT, Metric.INPUT):
        result = fxpress.optimize(net, [FactorizeCp(rank=2, metric=metric)], example_inputs=(x,), calibration=[x])
        result.program.verify()
        names = ["0.reduce", *(f"0.filter{i}" for i in range(sum(k > 1 for k in shape[2:]))), "0.expand"]
        assert [s.name for s in result.program.sites()] == names and result.program.sites()[-1].bias == "0.bias"
        assert float(((result.program.run(x) - net(x)).norm() / net(x).norm()).detach()) < 5e-3
        assert result.reports[0].taken[0].facts["kept"] == 2 * (sum(shape) - sum(k == 1 for k in shape)) / torch.Size(shape).numel()


def test_data_helps_and_the_ratio_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1)).eval(), correlated(6, 8, 12, 14)
    errors = {}
    for metric in (Metric.WEIGHT, Metric.INPUT):
        result = fxpress.optimize(net, [FactorizeCp(ratio=0.4, metric=metric)], example_inputs=(x,), calibration=[x])
        facts = result.reports[0].taken[0].facts
        errors[metric] = float(((result.program.run(x) - net(x)).norm() / net(x).norm()).detach())
        assert (0.35 < facts["kept"] <= 0.4 and facts["terms"] <= 10 + 1e-6) or metric is Metric.INPUT
    assert errors[Metric.INPUT] < 0.9 * errors[Metric.WEIGHT]
    pytest.importorskip("onnx")
    result.export_onnx(tmp_path / "model.onnx")


def test_kernels_of_zeros_and_of_any_scale() -> None:
    x, net = torch.randn(4, 12, 9, 9), nn.Conv2d(12, 16, 3, bias=False).eval()
    made = [net]
    for scale in (0.0, 1e-10, 1e10):
        made.append(nn.Conv2d(12, 16, 3, bias=False).eval())
        made[-1].weight.data = net.weight.data * scale
    spec = "factorize_cp{ratio=0.5,metric=weight}"
    errors = [fxpress.optimize(nn.Sequential(m), spec, example_inputs=(x,)).reports[0].taken[0].facts["weight_error"] for m in made]
    assert errors[1] == 0 and errors[2] == pytest.approx(errors[0], rel=1e-3) and errors[3] == pytest.approx(errors[0], rel=1e-3)


def test_singular_moments_are_damped_until_they_can_be_solved() -> None:
    net = nn.Sequential(nn.Conv2d(256, 16, 3, padding=1, bias=False)).eval()
    x = torch.randn(2, 256, 4, 4) + 10 * torch.rand(1, 256, 1, 1)
    result = fxpress.optimize(net, "factorize_cp{rank=128,starts=1,sweeps=2}", example_inputs=(x,), calibration=[(x,)])
    own, found = net(x), result.program.run(x)
    assert result.reports[0].taken[0].facts["output_error"] == pytest.approx(float(((found - own).norm() / own.norm()).detach()), rel=0.2, abs=1e-3)


def test_refusals() -> None:
    x = correlated(6, 8, 12, 14)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)).eval()
    skipped = {s.site: s.why for s in fxpress.optimize(net, ["factorize_cp{rank=4}"], example_inputs=(x,), calibration=[x]).reports[0].skipped}
    assert "8 groups" in skipped["2"] and "one position" in skipped["1"]
    for spec, why in (("factorize_cp{rank=40}", "rank 40 holds 880 weights, the kernel itself 576"), ("factorize_cp{ratio=0.01}", "leaves no rank")):
        with pytest.raises(PassError, match=why):
            fxpress.optimize(net, [spec], example_inputs=(x,), calibration=[x])
    for spec in ("factorize_cp", "factorize_cp{rank=3,ratio=0.5}"):
        with pytest.raises(SpecError, match="rank or ratio"):
            parse_pass(spec)
