"""The one-way pass: sizes, both starts and forms, composition with quantization and training, exports, and reasoned skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import PassError
from fxpress.passes.examples import Labelled

from .nets import correlated


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()


def test_sizes_and_names() -> None:
    x = correlated(4, 8, 12, 14)
    result = fxpress.optimize(net(), "oneway_conv{terms=2}", example_inputs=(x,))
    report = result.reports[0]
    assert [s.name for s in result.program.sites()] == [f"{i}.{n}" for i in (0, 2) for n in ("channels", "axis0", "axis1")] + ["4"]
    assert [t.bytes_after // 4 for t in report.taken] == [24 * 2 * (8 + 3 + 3), 16 * 2 * (24 + 5 + 5)]
    assert "no axis to filter along" in report.skipped[0].why and all(0 < t.facts["weight_error"] < 1 for t in report.taken)
    result.program.verify()


def test_terms_make_it_better_until_exact() -> None:
    x = correlated(4, 1, 12, 14)
    model = nn.Sequential(nn.Conv2d(1, 8, 5)).eval()
    errors = [fxpress.optimize(model, f"oneway_conv{{terms={t}}}", example_inputs=(x,)).reports[0].taken[0].facts["weight_error"] for t in (1, 2)]
    assert errors[0] > errors[1]
    with pytest.raises(PassError, match="3 terms a map hold 240 weights, the kernel itself 200"):
        fxpress.optimize(model, "oneway_conv{terms=3}", example_inputs=(x,))


def test_composed_trains_the_filters_and_factored_runs_them(tmp_path: Path) -> None:
    """A priori: drawn filters, trained composed, switched to factored, quantized and exported."""
    pytest.importorskip("onnx")
    x = correlated(4, 8, 12, 14)
    target = torch.randn(4, 4, 6, 7, generator=torch.Generator().manual_seed(1))
    recipe = ["oneway_conv{start=fresh,form=composed}", "recover{objective=task,steps=20,lr=0.01,evaluate_every=5}"]
    trained = fxpress.optimize(net(), recipe, example_inputs=(x,), training=[Labelled((x,), target)], loss=lambda y, t: (y - t).square().mean())
    assert "loss" in trained.reports[1].notes[0] and len(trained.program.sites()) == 1, "composed kernels are no stored weights"
    names = {s.site for s in trained.reports[1].taken}
    assert any(n.startswith("0.channels") for n in names) and any(n.startswith("2.axis1") for n in names)
    trained.save(tmp_path / "composed")
    small = fxpress.optimize(fxpress.load(tmp_path / "composed").program, "oneway_form{to=factored}")
    assert torch.allclose(small.program.run(x), trained.program.run(x), atol=1e-5)
    assert small.export_onnx(tmp_path / "small.onnx").max_error < 1e-4
    four = fxpress.optimize(small.program, "quantize_rtn{bits=8,only=[*.channels]}")
    assert four.program.nbytes < small.program.nbytes and four.export_onnx(tmp_path / "four.onnx").max_error < 1e-4


def test_drawn_filters_are_the_same_in_every_run() -> None:
    x = correlated(4, 8, 12, 14)
    one, two = (fxpress.optimize(net(), "oneway_conv{start=fresh}", example_inputs=(x,)).program for _ in range(2))
    assert torch.equal(one.run(x), two.run(x)) and float(one.run(x).std()) > 0.02, "signals neither vanish nor explode"
    assert not torch.equal(fxpress.optimize(net(), "oneway_conv{start=fresh}", example_inputs=(x,), seed=1).program.run(x), one.run(x))


def test_skips_have_reasons() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3), groups=8), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3)
    ).eval()
    report = fxpress.optimize(model, "oneway_conv", example_inputs=(correlated(2, 8, 12, 14),)).reports[0]
    why = {s.site: s.why for s in report.skipped}
    assert "no axis to filter along" in why["0"] and "one axis only" in why["1"]
    assert {t.site for t in report.taken} == {"3", "4"}
    assert "2" not in why or "transposed" in why["2"]


def test_cancelling_terms_are_told() -> None:
    from .test_oneway_fit import wave_step

    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].get_parameter("weight").copy_(wave_step().float().expand(4, -1, -1, -1))
    result = fxpress.optimize(model, "oneway_conv{terms=2}", example_inputs=(torch.randn(1, 2, 8, 8),))
    assert any("kernels terms cancel" in note for note in result.reports[0].notes)
