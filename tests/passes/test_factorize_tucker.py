"""Tucker-2 in a graph: geometry, ranks, 1-d and 2-d kernels, data against weights, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import PassError, SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.factorize_svd import Metric
from fxpress.passes.factorize_tucker import FactorizeTucker

from .nets import correlated


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 12, 3, groups=12)
    ).eval()


def _x() -> torch.Tensor:
    return correlated(6, 8, 12, 14)


@pytest.mark.parametrize("metric", [Metric.WEIGHT, Metric.INPUT])
def test_geometry_ratio_and_what_is_left_alone(metric: Metric) -> None:
    net, x = _net(), _x()
    result = fxpress.optimize(net, [FactorizeTucker(ratio=0.5, metric=metric)], example_inputs=(x,), calibration=[x])
    result.program.verify()
    names = [s.name for s in result.program.sites()]
    assert names == ["0.reduce", "0.core", "0.expand", "2", "3"] and result.program.sites()[2].bias == "0.bias"
    taken, skipped = result.reports[0].taken[0], {s.site: s.why for s in result.reports[0].skipped}
    assert 0.3 < taken.facts["kept"] <= 0.5 and result.program.run(x).shape == net(x).shape
    assert "12 groups" in skipped["3"] and "one position" in skipped["2"]


def test_full_ranks_compute_the_same_and_data_helps() -> None:
    net, x = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1)).eval(), _x()
    errors = {}
    for metric in (Metric.WEIGHT, Metric.INPUT):
        result = fxpress.optimize(net, [FactorizeTucker(ratio=0.3, metric=metric)], example_inputs=(x,), calibration=[x])
        errors[metric] = float(((result.program.run(x) - net(x)).norm() / net(x).norm()).detach())
    assert errors[Metric.INPUT] < 0.8 * errors[Metric.WEIGHT]
    low = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1)).eval()
    with torch.no_grad():  # a kernel of ranks 3 and 5
        core = torch.einsum("oiab,fo,ci->fcab", torch.randn(5, 3, 3, 3), torch.randn(24, 5), torch.randn(8, 3))
        low.get_parameter("0.weight").copy_(core)
    for spec in ("factorize_tucker{tolerance=0.001}", "factorize_tucker{tolerance=0.001,metric=weight}"):
        exact = fxpress.optimize(low, [spec], example_inputs=(x,), calibration=[x])
        assert (exact.reports[0].taken[0].facts["rank_in"], exact.reports[0].taken[0].facts["rank_out"]) == (3, 5)
        assert torch.allclose(exact.program.run(x), low(x), atol=2e-3)


def test_one_dimensional_kernels_export(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 16, 5, padding="same"), nn.ReLU(), nn.Conv1d(16, 16, 3, stride=2)).eval()
    x = correlated(6, 8, 20)
    result = fxpress.optimize(net, ["factorize_tucker{ratio=0.5,multiple=2}", "quantize_rtn{bits=8}"], example_inputs=(x,), calibration=[x])
    assert len(result.program.sites()) == 6 and all(s.compressed for s in result.program.sites())
    result.export_onnx(tmp_path / "model.onnx")


def test_noisy_kernels_have_as_many_ranks_as_components() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(32, 32, 3)).eval(), correlated(2, 32, 6, 6)
    with torch.no_grad():
        signal = torch.einsum("oiab,fo,ci->fcab", torch.randn(4, 4, 3, 3), torch.randn(32, 4), torch.randn(32, 4))
        net.get_parameter("0.weight").copy_(signal + 0.3 * torch.randn(32, 32, 3, 3))
    facts = fxpress.optimize(net, ["factorize_tucker{evbmf=true,metric=weight}"], example_inputs=(x,)).reports[0].taken[0].facts
    assert (facts["rank_in"], facts["rank_out"]) == (4, 4)


def test_refusals() -> None:
    with pytest.raises(PassError, match=r"ratio=0.01 leaves no ranks"):
        fxpress.optimize(_net(), ["factorize_tucker{ratio=0.01,multiple=4}"], example_inputs=(_x(),), calibration=[_x()])
    for spec in ("factorize_tucker", "factorize_tucker{ratio=0.5,evbmf=true}"):
        with pytest.raises(SpecError, match="exactly one of ratio, tolerance and evbmf"):
            parse_pass(spec)
