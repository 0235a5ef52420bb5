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
from fxpress.passes.factorize_tucker import FactorizeTucker, Form

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


def test_ranks_by_error_lose_less_within_the_same_ratio() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(24, 24, 3)).eval(), correlated(2, 24, 6, 6)
    with torch.no_grad():  # few inputs matter, all outputs do
        net.get_parameter("0.weight").mul_(torch.logspace(0, -3, 24).view(1, -1, 1, 1))
    errors = {}
    for ranks in ("equal", "error"):
        spec = f"factorize_tucker{{ratio=0.3,ranks={ranks},metric=weight}}"
        facts = fxpress.optimize(net, [spec], example_inputs=(x,)).reports[0].taken[0].facts
        assert facts["kept"] <= 0.3
        errors[ranks] = facts["weight_error"]
    assert errors["error"] < 0.5 * errors["equal"] and facts["rank_in"] < facts["rank_out"]


TAPS = [
    (nn.Conv2d(8, 16, (9, 1), stride=(2, 1), padding=(3, 0), dilation=(2, 1)), (30, 1), ((2, 1, 9, 1), (16, 2, 1, 3))),
    (nn.Conv2d(8, 16, (1, 9), padding=(0, 4)), (1, 30), ((2, 1, 1, 9), (16, 2, 3, 1))),
    (nn.Conv1d(8, 16, 9, stride=2, padding="valid"), (30,), ((2, 1, 9, 1), (16, 2, 1, 3))),
]


@pytest.mark.parametrize(("conv", "places", "shapes"), TAPS)
def test_taps_that_a_kernel_has_are_found_with_its_geometry(conv: nn.Module, places: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    mix, reduce, taps = (torch.randn(*s, generator=generator) for s in ((16, 2, 3), (3, 8), (2, 9)))
    with torch.no_grad():
        conv.get_parameter("weight").copy_(torch.einsum("fjr,rc,jp->fcp", mix, reduce, taps).view(conv.get_parameter("weight").shape))
    net, x = nn.Sequential(conv).eval(), correlated(6, 8, *places)
    for metric in ("input", "weight"):
        spec = f"factorize_tucker{{tolerance=0.001,form=taps,metric={metric}}}"
        result = fxpress.optimize(net, [spec], example_inputs=(x,), calibration=[x], dynamic_shapes=({0: torch.export.Dim("batch")},))
        result.program.verify()
        sites = result.program.sites()
        assert [s.name for s in sites] == ["0.reduce", "0.taps", "0.mix"] and sites[-1].bias == "0.bias"
        assert tuple(tuple(s.shape) for s in sites[1:]) == shapes
        assert torch.allclose(result.program.run(x[:2]), net(x[:2]), atol=5e-3)


def test_taps_keep_the_ratio_and_data_helps(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 24, (9, 1), padding=(4, 0))).eval(), correlated(6, 8, 40, 1)
    errors = {}
    for metric in (Metric.WEIGHT, Metric.INPUT):
        result = fxpress.optimize(net, [FactorizeTucker(ratio=0.5, form=Form.TAPS, metric=metric)], example_inputs=(x,), calibration=[x])
        facts = result.reports[0].taken[0].facts
        errors[metric] = float(((result.program.run(x) - net(x)).norm() / net(x).norm()).detach())
        assert 8 * facts["channels"] * (facts["channels"] < 8) + facts["channels"] * facts["taps"] * (24 + 9) <= 0.5 * 24 * 8 * 9
    assert errors[Metric.INPUT] < 0.8 * errors[Metric.WEIGHT]
    result.export_onnx(tmp_path / "model.onnx")


def test_factors_that_keep_all_channels_are_left_out() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv1d(1, 16, 9)).eval(), torch.randn(6, 1, 40)
    for spec, names in (
        ("ratio=0.5", ["0.core", "0.expand"]),
        ("ratio=0.8,multiple=4,metric=weight", ["0.core", "0.expand"]),
        ("ratio=0.5,form=taps", ["0.taps", "0.mix"]),
    ):
        result = fxpress.optimize(net, [f"factorize_tucker{{{spec}}}"], example_inputs=(x,), calibration=[x])
        assert [s.name for s in result.program.sites()] == names
        assert sum(s.parameters for s in result.program.sites()) <= 0.8 * 16 * 9


def test_long_kernels_do_without_the_gram_of_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1)).eval(), _x()
    errors = {}
    for whole in (2048, 1):
        monkeypatch.setattr("fxpress.passes.factorize_tucker.WHOLE", whole)
        errors[whole] = fxpress.optimize(net, ["factorize_tucker{ratio=0.3}"], example_inputs=(x,), calibration=[x]).reports[0].taken[0].facts["output_error"]
    plain = fxpress.optimize(net, ["factorize_tucker{ratio=0.3,metric=weight}"], example_inputs=(x,))
    assert errors[2048] <= errors[1] < 0.8 * float(((plain.program.run(x) - net(x)).norm() / net(x).norm()).detach())


def test_refusals() -> None:
    for conv, x, why in (
        (nn.Conv2d(8, 8, 3), _x(), "long along two axes"),
        (nn.Conv2d(8, 8, (3, 1)), _x(), "has 14 places along"),
        (nn.Conv1d(8, 8, 3), torch.randn(2, 8, 9), "leaves no channels and taps"),
    ):
        skipped = fxpress.optimize(nn.Sequential(conv), ["factorize_tucker{ratio=0.02,form=taps,allow_empty=true}"], example_inputs=(x,), calibration=[x])
        assert why in skipped.reports[0].skipped[0].why
    with pytest.raises(SpecError, match="give ratio or tolerance"):
        parse_pass("factorize_tucker{evbmf=true,form=taps}")
    with pytest.raises(PassError, match=r"ratio=0.01 leaves no ranks"):
        fxpress.optimize(_net(), ["factorize_tucker{ratio=0.01,multiple=4}"], example_inputs=(_x(),), calibration=[_x()])
    for spec in ("factorize_tucker", "factorize_tucker{ratio=0.5,evbmf=true}"):
        with pytest.raises(SpecError, match="exactly one of ratio, tolerance and evbmf"):
            parse_pass(spec)


@pytest.mark.parametrize(
    "spec", ["factorize_tucker{ratio=0.25}", "factorize_tucker{ratio=0.25,metric=weight}", "factorize_cp{ratio=0.25}", "oneway_conv{terms=1}"]
)
def test_factors_keep_the_memory_format_of_outputs(spec: str, tmp_path: Path) -> None:
    """What reads them as one row still may, as they are and loaded, and they can be exported again."""
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 4)).eval()
    x = torch.randn(4, 1, 10, 10)
    result = fxpress.optimize(net, spec, example_inputs=(x,), calibration=[(x,)], dynamic_shapes=({0: torch.export.Dim("batch")},))
    result.save(tmp_path / "saved")
    loaded = fxpress.load(tmp_path / "saved").program
    assert torch.equal(result.program.run(x), loaded.run(x)) and loaded.to_exported() is not None
