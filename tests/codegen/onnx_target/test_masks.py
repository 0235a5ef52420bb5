"""Sparse weights in ONNX files: low-bit ones keep their codes, zeros included; plain ones are decoded; the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.codegen.onnx_target.masks import without_masks
from fxpress.ir.program import Program


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))


def _sparse(*recipe: str) -> fxpress.Result:
    return fxpress.optimize(_net(), [*recipe, "store_sparse"], example_inputs=(torch.randn(3, 64),))


@pytest.mark.parametrize("pattern", ["sparsity=0.6", "pattern=16:32", "pattern=2:4"])
def test_low_bit_codes_stay_low_bit(pattern: str, tmp_path: Path) -> None:
    result = _sparse(f"prune_magnitude{{{pattern}}}", "quantize_rtn{bits=4,group_size=32}")
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.max_error < 1e-6 and report.fused == 2
    assert [s.format.split("{")[0] for s in report.lowering.sites] == [s.format.name for s in result.program.sites()]
    assert report.lowering.notes[0] == "2 sparse weights are written with their zeros: no ONNX runtime gains from masks"


def test_sparse_floats_are_decoded(tmp_path: Path) -> None:
    report = _sparse("prune_magnitude{sparsity=0.7}").export_onnx(tmp_path / "model.onnx")
    assert report.max_error < 1e-6 and all("there is no fast path" in s.why for s in report.lowering.sites)


def test_the_program_is_left_as_it_was() -> None:
    program: Program = _sparse("prune_magnitude{sparsity=0.6}", "quantize_rtn{bits=4}").program
    before = program.to_text()
    assert [s.format.to_spec() for s in without_masks(program).sites()] == ["affine{bits=4}"] * 2
    assert program.to_text() == before
    dense = _sparse("prune_magnitude{sparsity=0.6}").program
    assert without_masks(dense) is dense
