"""The pass: better than rounding at the same bits, exact where weights are kept apart, zeros kept, resumable, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.formats.composite import Composite
from fxpress.ir.formats.lut import Lut
from fxpress.ir.program import Program
from fxpress.ir.verify import verify
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.checkpoint import Checkpoint, fingerprint
from fxpress.passes.context import Context
from fxpress.passes.pipeline import Outcome, run_pipeline

from ..tiny import randn
from .nets import conv_net, output_error, tied_net


def run(net: tuple[Program, Context], *specs: str) -> Outcome:
    return run_pipeline(net[0], [parse_pass(s) for s in specs], net[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("net", [conv_net, tied_net])
def test_refined_beats_clustered_beats_rounded(net: object, bits: int) -> None:
    program, ctx = net()  # type: ignore[operator]
    errors = [
        output_error(program, run((program, ctx), spec).program, ctx)
        for spec in (
            f"quantize_lut{{bits={bits},sensitivity=gram}}",
            f"quantize_lut{{bits={bits},sensitivity=gram,refine=off}}",
            f"quantize_rtn{{bits={bits}}}",
        )
    ]
    assert errors[0] < 0.9 * errors[1] and errors[1] < errors[2]


@pytest.mark.parametrize("sensitivity", ["guided", "fisher", "gram"])
@pytest.mark.parametrize("extra", ["", ",outliers=0.01,sensitive=0.01", ",rows_per_table=none", ",groups=2", ",entries=6", ",sequential=false"])
def test_every_option_runs_verifies_and_is_close(sensitivity: str, extra: str) -> None:
    program, ctx = conv_net()
    out = run((program, ctx), f"quantize_lut{{bits=4,sensitivity={sensitivity}{extra}}}")
    verify(out.program)
    assert len(out.reports[0].taken) == 4
    assert output_error(program, out.program, ctx) < 0.6
    for result in out.reports[0].taken:
        assert result.facts["guided_error"] <= result.facts["guided_error_before"]


def test_kept_weights_are_exact_up_to_half_precision() -> None:
    program, ctx = conv_net()
    before = {s.name: s.matrix().clone() for s in program.sites()}
    out = run((program, ctx), "quantize_lut{bits=2,outliers=0.02,sensitive=0.01}")
    for site in out.program.sites():
        assert isinstance(site.format, Composite)
        kept = site.format.split(site.payload(), site.rows, site.columns, torch.float32)[1]
        rows, columns = kept[0].indices(kept[1], site.rows, site.columns)  # type: ignore[attr-defined]
        assert len(rows) == int(0.02 * site.parameters) + int(0.01 * site.parameters)
        torch.testing.assert_close(site.matrix()[rows, columns], before[site.name][rows, columns], rtol=1e-3, atol=1e-4)


def test_bits_count_codes_tables_scales_and_kept_weights() -> None:
    out = run(conv_net(), "quantize_lut{bits=3,outliers=0.01}")
    for site, result in zip(out.program.sites(), out.reports[0].taken, strict=True):
        stored = sum(t.nbytes for t in site.payload().values())
        assert result.bytes_after == stored == site.nbytes
        assert result.facts["bits_per_weight"] == pytest.approx(8 * stored / site.parameters)


@pytest.mark.parametrize("refine", ["lnq", "off"])
def test_zeros_left_by_pruning_stay_zero(refine: str) -> None:
    out = run(conv_net(), "prune_magnitude{sparsity=0.5}", f"quantize_lut{{bits=3,refine={refine}}}")
    for site, result in zip(out.program.sites(), out.reports[1].taken, strict=True):
        assert result.facts["zeros_lost"] == 0
        assert float((site.matrix() == 0).float().mean()) >= result.facts["zeros_before"] >= 0.49
    assert "all stayed exactly zero" in out.reports[1].notes[0]


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_resumes_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    spec = "quantize_lut{bits=3,outliers=0.01,sensitive=0.005,sensitivity=fisher}"
    program, ctx = conv_net()
    want = [t for s in run((program, ctx), spec).program.sites() for t in s.payload().values()]

    def resumable() -> Context:
        return Context(calibration=ctx.calibration, checkpoint=Checkpoint(tmp_path / "c", fingerprint(program, [spec], ctx.calibration, 0)))

    saved, count = Checkpoint.write, [0]

    def write_then_die(self: Checkpoint, *args: object) -> None:
        saved(self, *args)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "write", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        run((program, resumable()), spec)
    monkeypatch.undo()
    again = resumable()
    got = [t for s in run((program, again), spec).program.sites() for t in s.payload().values()]
    assert again.checkpoint is not None and again.checkpoint.reused >= after
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_odd_rows_come_out_right() -> None:
    net = nn.Linear(16, 6)
    with torch.no_grad():
        net.weight[0] = 0.0
        net.weight[1] = 0.5
        net.weight[2] = torch.arange(16) % 3 * 0.25
        net.weight[3, 5] = 1000.0
    program = capture(net, (randn(32, 16),))
    ctx = Context(calibration=as_calls([randn(32, 16, seed=s) for s in range(4)], program.inputs))
    for spec in ("quantize_lut{bits=4}", "quantize_lut{bits=4,sensitivity=uniform,refine=off}", "quantize_lut{bits=4,table=float16}"):
        site = run((program, ctx), spec).program.sites()[0]
        torch.testing.assert_close(site.matrix()[:3], net.weight[:3].detach(), rtol=0, atol=0.51 / 254)  # half a step of the 8-bit grid
        assert abs(float(site.matrix()[3, 5]) - 1000) < 5


def test_uniform_clustering_needs_no_data_and_takes_embeddings() -> None:
    program, _ = tied_net()
    out = run((program, Context()), "quantize_lut{bits=4,sensitivity=uniform,refine=off,kinds=[linear,embedding]}")
    assert len(out.reports[0].taken) == 4
    assert all(isinstance(s.format, Lut) for s in out.program.sites())


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("quantize_lut{bits=4,sensitivity=uniform}", SpecError, "refine=off"),
        ("quantize_lut{bits=4,sensitivity=uniform,refine=off,sensitive=0.1}", SpecError, "use outliers= alone"),
        ("quantize_lut{entries=1}", SpecError, ">= 2"),
        ("quantize_lut{bits=4,sensitivity=hessian}", SpecError, "expected one of"),
        ("quantize_lut", PassError, "no width is given"),
        ("quantize_lut{bits=4,rows_per_table=9999}", PassError, "rows_per_table"),
        ("quantize_lut{bits=4,only=[embed*],kinds=[embedding]}", PassError, "embedding sees indices"),
    ],
)
def test_refusals_say_what_to_do(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tied_net(), spec)


def test_no_calibration_and_infinite_gradients_are_clear_errors() -> None:
    program, _ = conv_net()
    with pytest.raises(CalibrationError, match="calibration data"):
        run((program, Context()), "quantize_lut{bits=4}")
    huge = Context(calibration=as_calls([torch.full((8, 3, 4, 4), 1e25)], program.inputs))
    with pytest.raises(CalibrationError, match="not finite"):
        run((program, huge), "quantize_lut{bits=4,sensitivity=fisher}")
