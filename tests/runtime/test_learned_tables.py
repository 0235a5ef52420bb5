"""Learned tables from end to end: optimize, summary, save and load, attach, and the ONNX file, on models of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress

from ..checks import assert_same
from ..grouping import some_slow
from ..tiny import fresh_program, tiny


@pytest.mark.parametrize("name", some_slow(["llama", "gpt2", "bert", "conv"], "gpt2", "bert"))
@pytest.mark.parametrize("spec", some_slow(["quantize_lut{bits=3}", "quantize_lut{bits=4,outliers=0.01,sensitive=0.002}"], "quantize_lut{bits=3}"))
def test_saves_loads_attaches_and_exports(name: str, spec: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    program = fresh_program(name)
    calibration = [(program.inputs.args, program.inputs.kwargs)[1] or program.inputs.args]
    result = fxpress.optimize(program, [spec], calibration=calibration)
    assert len(result.reports[0].taken) >= 2 and "quantize_lut" in result.summary()
    result.save(tmp_path / "artifact")
    again = fxpress.load(tmp_path / "artifact")
    assert_same([s.payload() for s in again.program.sites()], [s.payload() for s in result.program.sites()])
    assert_same(again.program.run_examples(), result.program.run_examples())
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.max_error < 1e-4
    assert all(row.format.startswith(("lut", "composite")) for row in report.lowering.sites if row.site in {t.site for t in result.reports[0].taken})


def test_attached_to_the_users_own_module() -> None:
    model = tiny("llama")
    program = fresh_program("llama")
    result = fxpress.optimize(program, ["quantize_lut{bits=4}"], calibration=[program.inputs.kwargs])
    small = result.attach(model.model)
    got = small(*program.inputs.args, **program.inputs.kwargs)
    want = result.program.run_examples()
    leaves = [torch.utils._pytree.tree_leaves(x) for x in (got, want)]
    found = [t for t in leaves[0] if isinstance(t, torch.Tensor)]
    torch.testing.assert_close(found[0], next(t for t in leaves[1] if isinstance(t, torch.Tensor)))
